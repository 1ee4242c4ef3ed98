"""Whatever dies, training soon goes on from the last checkpoint, and nothing of the old is left (G3, G5)."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from db.session import Database
from tests.faults import meters, parts
from tests.faults.history import STEP, Witness
from tests.faults.injections import kill
from tests.faults.test_g02_one_owner import attempt_row
from tests.stack import Stack, wait_for
from tests.workers.test_recovery import (
    job_of,
    submit,
    wait_for_checkpoint,
    wait_for_end,
)

pytestmark = [pytest.mark.faults(g=3), pytest.mark.faults(g=5), pytest.mark.timeout(4 * 3600)]
MAX_STEPS, SAVE_STEPS = 30, 5


def supervisor(_stack: Stack, database: Database, job_id: str) -> list[psutil.Process]:
    row = attempt_row(database, job_id, 1)
    assert row is not None
    return [psutil.Process(int(str(row["owner_pid"])))]


def worker(stack: Stack, _database: Database, _job_id: str) -> list[psutil.Process]:
    return parts.part(stack, "worker-train")


def torchrun(stack: Stack, _database: Database, job_id: str) -> list[psutil.Process]:
    return [process for process in parts.attempts(stack, "train", job_id, 1) if parts.is_agent(process)]


def rank(stack: Stack, _database: Database, job_id: str) -> list[psutil.Process]:
    return [process for process in parts.attempts(stack, "train", job_id, 1) if not parts.is_agent(process)]


# What is seen by the one that waits for it, and what has to be missed first: seconds to the next attempt, and
# how the attempt is counted.
VICTIMS = [(rank, 15, "failed"), (torchrun, 15, "failed"), (supervisor, 75, "lost"), (worker, 75, "lost")]


@parts.on_both()
@parts.repeated(20)
@pytest.mark.parametrize(("victim", "within_s", "outcome"), VICTIMS, ids=[one[0].__name__ for one in VICTIMS])
def test_kill_9_and_the_job_goes_on(
    stack: Stack,
    stack_database: Database,
    chat_file: Path,
    judge: Callable[..., Witness],
    victim: Callable[..., list[psutil.Process]],
    within_s: float,
    outcome: str,
    number: int,
) -> None:
    choice = random.Random(parts.SEED + number)
    job_id = submit(stack, chat_file, max_steps=MAX_STEPS, save_steps=SAVE_STEPS, logging_steps=1)
    wait_for_checkpoint(stack, job_id)
    step = choice.randrange(MAX_STEPS // 2)
    wait_for(lambda: job_of(stack, job_id)["progress"]["step"] >= step, within_s=200, what=f"step {step}")

    counted = meters.read(stack, "attempts_total", kind="train", outcome=outcome)
    kill(victim(stack, stack_database, job_id))
    t0 = time.monotonic()

    wait_for(lambda: not parts.attempts(stack, "train", job_id, 1), within_s=15, what="no orphan of it")
    wait_for(lambda: attempt_row(stack_database, job_id, 2), within_s=within_s, what="the next attempt")
    took_s = time.monotonic() - t0
    meters.wait_until_shown(stack, "attempts_total", counted + 1, kind="train", outcome=outcome)
    ended = wait_for_end(stack, job_id)
    assert ended["status"] == "succeeded", ended["error"]
    [job] = judge(job_id).jobs
    assert steps_lost(job.events) <= SAVE_STEPS
    print(f"{victim.__name__}: next attempt after {took_s:.1f} s")  # noqa: T201 (for README)


def steps_lost(events: list[tuple[str, dict]]) -> int:
    """How many steps the second attempt did once more."""
    seen = 0
    for message, _ in events:
        if message.startswith("Resuming from the checkpoint at step"):
            return seen - int(message.split()[-1])
        if step := STEP.match(message):
            seen = max(seen, int(step[1]))
    raise AssertionError("no attempt was resumed")
