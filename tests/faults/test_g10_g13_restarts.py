"""The API dies, and parts are told to stop: no run notices, no answer is cut off (G10, G13)."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from db.session import Database
from db.work_models import Task
from tests.faults import parts
from tests.faults.history import Witness
from tests.faults.injections import is_gone, kill
from tests.stack import Stack, wait_for
from tests.workers.test_recovery import (
    assert_resumes,
    submit,
    wait_for_checkpoint,
    wait_for_end,
    wait_for_message,
)

pytestmark = [pytest.mark.timeout(3600)]
DOWN_S = (0, 20, 60)


def follow(stack: Stack, job_id: str, last_id: str | None) -> Iterator[str]:
    """The ids of events as one stream brings them, then `[DONE]`; ends early when the stream does."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    with (
        suppress(httpx.TransportError),
        stack.http() as client,
        client.stream("GET", f"/fine_tuning/jobs/{job_id}/events/stream", headers=headers) as answer,
    ):
        for line in answer.iter_lines() if answer.is_success else ():
            if line.startswith("data: "):
                yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])["id"]


@parts.on_both()
@pytest.mark.faults(g=10)
@parts.repeated(len(DOWN_S))
def test_g10_the_api_dies_and_the_stream_goes_on_where_it_was(
    stack: Stack, chat_file: Path, judge: Callable[..., Witness], number: int
) -> None:
    job_id = submit(stack, chat_file, max_steps=20, save_steps=5, logging_steps=1)
    wait_for_checkpoint(stack, job_id)
    got: list[str] = []
    died = threading.Event()
    while "[DONE]" not in got:
        for event_id in follow(stack, job_id, got[-1] if got else None):
            got.append(event_id)
            if len(got) > 12 and not died.is_set():
                died.set()
                down_until = time.monotonic() + DOWN_S[number]
                kill(parts.part(stack, "api"))
                while time.monotonic() < down_until:  # as often as `up` starts it again
                    kill(parts.part(stack, "api"))
    assert died.is_set()
    job = wait_for_end(stack, job_id)
    assert job["status"] == "succeeded", job["error"]
    listed = [event.id for event in stack.sdk().fine_tuning.jobs.list_events(job_id, limit=100)]
    assert got == [*reversed(listed), "[DONE]"], "a gap or a repeat"
    assert {held.token for held in judge(job_id).attempts} == {1}, "no attempt was charged"


@pytest.mark.faults(g=13)
@parts.repeated(5)
def test_g13_a_worker_that_is_told_to_stop_saves_and_charges_nothing(
    stack: Stack, stack_database: Database, chat_file: Path, judge: Callable[..., Witness]
) -> None:
    job_id = submit(stack, chat_file, save_steps=5)
    wait_for_checkpoint(stack, job_id)
    [worker] = parts.part(stack, "worker-train")
    worker.terminate()
    wait_for_message(stack, job_id, "The worker shuts down; the job waits for another attempt")
    assert_resumes(stack, job_id)
    with stack_database.read() as session:
        charged = session.scalars(
            select(Task.charged).where(Task.subject_id == job_id, Task.kind == "train")
        ).one()
    assert charged == 1, "only the attempt that was cancelled"
    [job] = judge(job_id).jobs
    saved = [message for message, _ in job.events if message.startswith("Checkpoint created")]
    resumed = [message for message, _ in job.events if message.startswith("Resuming")]
    assert resumed[0].split()[-1] in [message.split()[-1] for message in saved], "the one saved at the end"


@parts.on_both(long=True)
@pytest.mark.faults(g=13)
@parts.repeated(5)
def test_g13_an_api_that_is_told_to_stop_drops_no_request(stack: Stack) -> None:
    over = threading.Event()

    def ask() -> Counter[str]:
        told: Counter[str] = Counter()
        while not over.is_set():
            with stack.http() as client:  # a connection each: either side may close an idle one
                try:
                    told[str(client.get("/models", timeout=30).status_code)] += 1
                except httpx.ConnectError:  # nothing was sent, so nothing is lost
                    told["away"] += 1
                except httpx.TransportError as error:
                    told[repr(error)] += 1
        return told

    [api] = parts.part(stack, "api")
    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        t0 = time.monotonic()
        api.terminate()
        wait_for(lambda: is_gone(api), within_s=10, what="the drain")
        print(f"drained in {time.monotonic() - t0:.1f} s")  # noqa: T201 (for README)
        wait_for(lambda: parts.part(stack, "api"), within_s=60, what="another API")
        stack.sdk(max_retries=20).models.list()
        over.set()
        told = sum((future.result() for future in asking), Counter())
    assert set(told) <= {"200", "away"}, told
    assert told["200"] > 0
