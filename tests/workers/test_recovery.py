"""Killed and stopped workers: the job goes on from a checkpoint, and nothing of the old attempt is left."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.stack import Stack, processes_of, start_stack, wait_for

# Many more steps than are taken: a job must not reach its end before the test's signal reaches it.
HYPERPARAMETERS = {
    "max_steps": 5_000,
    "batch_size": 4,
    "learning_rate": 0.001,
    "max_length": 128,
    "save_steps": 10,
    "logging_steps": 100,
}

RESUMED = "Resuming from the checkpoint at step"  # the second attempt's trainer says it


@pytest.fixture
def own_stack(tmp_path: Path, tiny_model: Path) -> Iterator[Stack]:
    """A stack whose parts may be killed."""
    stack = start_stack(tmp_path / "home", import_dirs=[tiny_model])
    stack.import_model(tiny_model, model_id="tiny")
    yield stack
    if stack.process.poll() is None:
        stack.stop()
    assert processes_of(stack.home) == []


def submit(stack: Stack, chat_file: Path, *, nodes: int = 1, **changes: int) -> str:
    client = stack.sdk()
    with chat_file.open("rb") as source:
        file = client.files.create(file=source, purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS | changes}},  # type: ignore[typeddict-item]
        extra_body={"resources": {"nproc_per_node": 1, "nnodes": nodes}},
    ).id


def job_of(stack: Stack, job_id: str) -> dict[str, Any]:
    return stack.sdk(max_retries=5).fine_tuning.jobs.retrieve(job_id).to_dict()


def wait_for_checkpoint(stack: Stack, job_id: str) -> None:
    client = stack.sdk()
    wait_for(
        lambda: client.fine_tuning.jobs.checkpoints.list(job_id).data,
        within_s=200,
        what="the first checkpoint",
        every_s=0.3,
    )


def wait_for_end(stack: Stack, job_id: str) -> dict[str, Any]:
    return wait_for(
        lambda: (
            job if (job := job_of(stack, job_id))["status"] in ("succeeded", "failed", "cancelled") else None
        ),
        within_s=400,
        what="the end of the job",
        every_s=0.5,
    )


def messages_of(stack: Stack, job_id: str) -> list[str]:
    return [
        event.message
        for event in stack.sdk(max_retries=5).fine_tuning.jobs.list_events(job_id, limit=100)
        if event.type == "message"
    ]


def wait_for_message(stack: Stack, job_id: str, start: str) -> None:
    wait_for(
        lambda: any(message.startswith(start) for message in messages_of(stack, job_id)),
        within_s=200,
        what=f"an event {start!r}",
        every_s=0.3,
    )


def assert_resumes(stack: Stack, job_id: str) -> None:
    """Waits until the second attempt goes on from a checkpoint, and cancels the job."""
    wait_for_message(stack, job_id, "Fine-tuning job goes on (attempt 2)")
    wait_for_message(stack, job_id, RESUMED)
    stack.sdk().fine_tuning.jobs.cancel(job_id)
    assert wait_for_end(stack, job_id)["status"] == "cancelled"


def training_processes(stack: Stack, job_id: str, attempt: int) -> list[psutil.Process]:
    run_dir = str(stack.home / "runs" / job_id / str(attempt))
    return [p for p in processes_of(stack.home) if any(run_dir in word for word in p.cmdline())]


def workers_of(stack: Stack, queue: str) -> list[psutil.Process]:
    """The Celery parent of a queue and its pool children."""
    return [
        process
        for process in processes_of(stack.home)
        if "celery" in process.cmdline() and f"{queue}@{os.uname().nodename}" in process.cmdline()
    ]


def test_kill_9_of_the_worker_resumes_from_a_checkpoint_and_leaves_no_rank(
    own_stack: Stack, chat_file: Path
) -> None:
    job_id = submit(own_stack, chat_file)
    wait_for_checkpoint(own_stack, job_id)
    old = training_processes(own_stack, job_id, 1)
    assert len(old) >= 2, "torchrun and its rank"

    for process in workers_of(own_stack, "train"):
        process.kill()

    wait_for(
        lambda: not any(process.is_running() and process.status() != "zombie" for process in old),
        within_s=15,
        what="the old attempt's processes to die",
    )
    assert_resumes(own_stack, job_id)


@pytest.mark.long
def test_kill_9_of_a_rank_is_an_attempt_of_its_own(own_stack: Stack, chat_file: Path) -> None:
    job_id = submit(own_stack, chat_file, max_steps=150)
    wait_for_checkpoint(own_stack, job_id)
    for process in training_processes(own_stack, job_id, 1):
        if "torch.distributed.run" not in process.cmdline():
            process.kill()
    wait_for_message(own_stack, job_id, RESUMED)
    ended = wait_for_end(own_stack, job_id)
    assert ended["status"] == "succeeded", ended["error"]


def test_sigterm_to_up_saves_requeues_uncharged_and_leaves_no_process(
    own_stack: Stack, chat_file: Path, tiny_model: Path
) -> None:
    job_id = submit(own_stack, chat_file)
    wait_for_checkpoint(own_stack, job_id)

    assert own_stack.stop(signal.SIGTERM) == 0

    assert processes_of(own_stack.home) == []
    again = start_stack(own_stack.home, import_dirs=[tiny_model])
    try:
        assert_resumes(again, job_id)
        assert "The worker shuts down; the job waits for another attempt" in messages_of(again, job_id)
    finally:
        assert again.stop(signal.SIGINT) == 0
    assert processes_of(own_stack.home) == []


def test_a_drained_node_gives_its_job_back_uncharged_and_takes_it_when_it_may(
    own_stack: Stack, chat_file: Path
) -> None:
    job_id = submit(own_stack, chat_file)
    wait_for_checkpoint(own_stack, job_id)
    with own_stack.http() as client:
        (node,) = client.get("/nodes").json()["data"]
        assert [device["held_by"] for device in node["devices"]] == [job_id]

        client.post(f"/nodes/{node['name']}/drain")

        wait_for(lambda: job_of(own_stack, job_id)["status"] == "queued", within_s=60, what="the job back")
        assert not training_processes(own_stack, job_id, 1)
        wait_for(
            lambda: client.get("/nodes").json()["data"][0]["last_seen_at"] > node["last_seen_at"] + 3,
            within_s=60,
            what="some more ticks, in which the node could have claimed",
        )
        assert job_of(own_stack, job_id)["status"] == "queued"
        client.post(f"/nodes/{node['name']}/undrain")
    assert_resumes(own_stack, job_id)
    assert "The worker shuts down; the job waits for another attempt" in messages_of(own_stack, job_id)
