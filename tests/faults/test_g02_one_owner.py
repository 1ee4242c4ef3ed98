"""At most one live owner a job; one that is late changes nothing, and its trainers die (G2)."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from db.session import Database
from db.states import JOB_TERMINAL
from db.work_models import Attempt, Task
from tests.faults import parts
from tests.faults.history import Witness
from tests.faults.injections import frozen, slow_down
from tests.stack import Stack, wait_for
from tests.workers.test_recovery import RESUMED, submit, wait_for_checkpoint, wait_for_end, wait_for_message

pytestmark = [pytest.mark.faults(g=2), pytest.mark.timeout(3600)]


@contextmanager
def second_node(stack: Stack, env: dict[str, str]) -> Iterator[None]:
    """A training worker of another node on the same home, database and broker."""
    options = ["-Q", "train", "-c", "1", "-n", "train@other", "--without-gossip", "--without-mingle"]
    argv = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", *options]
    with (stack.home / "logs" / "other.log").open("ab") as log:
        worker = subprocess.Popen(argv, env=env | {"RESIDENCY_NODE": "other"}, stdout=log, stderr=log)
    try:
        yield
    finally:
        worker.terminate()
        worker.wait(timeout=150)


def attempt_row(database: Database, job_id: str, token: int) -> dict[str, object] | None:
    """An attempt at training as the database has it."""
    with database.read() as session:
        row = session.scalars(
            select(Attempt)
            .join(Task, Task.id == Attempt.task_id)
            .where(Task.subject_id == job_id, Task.kind == "train", Attempt.token == token)
        ).one_or_none()
        return row and {column.name: getattr(row, column.name) for column in Attempt.__table__.columns}


def written_below(home: Path, processes: list[psutil.Process]) -> set[Path]:
    """The files under `home` that processes hold open for writing."""
    opened = [Path(file.path) for process in processes for file in process.open_files() if file.mode != "r"]
    return {path for path in opened if path.is_relative_to(home)}


@contextmanager
def frozen_node(workers: list[psutil.Process], database: Database) -> Iterator[None]:
    """Freeze workers and the children that they then have, of which none is changing the database.

    SQLite's lock stays with its owner for as long as that stands still; PostgreSQL ends such a transaction.
    """
    while True:
        with frozen(workers), frozen(parts.children(workers)):
            try:
                with database.write():
                    pass
            except OperationalError:
                continue  # thawed, and once more
            yield
            return


@pytest.mark.long
@parts.repeated(10)
def test_a_stale_owner_changes_nothing_and_its_trainers_die(
    stack: Stack, stack_database: Database, chat_file: Path, judge: Callable[..., Witness]
) -> None:
    env = parts.environment(stack)
    job_id = submit(stack, chat_file)
    for queue in ("train", "cpu"):
        parts.ring(env["RESIDENCY_REDIS_URL"], queue, times=3)
    wait_for_checkpoint(stack, job_id)
    run_dir = stack.home / "runs" / job_id / "1"
    stale = parts.attempts(stack, "train", job_id, 1)
    assert len(stale) >= 2, "torchrun and its rank"
    slow_down(stale)
    workers = [*parts.part(stack, "worker-train"), *parts.part(stack, "worker-cpu")]

    with second_node(stack, env):
        # The whole node falls silent, but for its trainers, which do not know that their lease is gone.
        with frozen_node(workers, stack_database):
            parts.ring(env["RESIDENCY_REDIS_URL"], "train", times=3)
            lost = wait_for(
                lambda: attempt_row(stack_database, job_id, 2) and attempt_row(stack_database, job_id, 1),
                within_s=120,
                what="another node to take the job",
            )
            wait_for_message(stack, job_id, RESUMED)
            assert all(process.is_running() for process in stale), "both train at once"
            assert all(path.is_relative_to(run_dir) for path in written_below(stack.home, stale))

        wait_for(
            lambda: not parts.attempts(stack, "train", job_id, 1),
            within_s=10,
            what="the stale tree to die",
        )
        left = parts.files_below(run_dir)
        assert attempt_row(stack_database, job_id, 1) == lost, "a late write of the stale owner"
        assert parts.attempts(stack, "train", job_id, 2), "the new owner was hit"
        stack.sdk().fine_tuning.jobs.cancel(job_id)
        assert wait_for_end(stack, job_id)["status"] == "cancelled"
    assert parts.files_below(run_dir) == left
    witness = judge(job_id)
    assert [held.token for held in witness.attempts if held.what.startswith("train")] == [1, 2]


@parts.repeated(5)
def test_every_ring_three_times_runs_each_piece_of_work_once(
    stack: Stack, chat_file: Path, judge: Callable[..., Witness]
) -> None:
    url = parts.environment(stack)["RESIDENCY_REDIS_URL"]
    job_ids = [submit(stack, chat_file, max_steps=20) for _ in range(2)]
    jobs = stack.sdk(max_retries=5).fine_tuning.jobs

    def ended_though_rung() -> bool:
        for queue in ("train", "cpu"):
            parts.ring(url, queue, times=3)
        return all(jobs.retrieve(job_id).status in JOB_TERMINAL for job_id in job_ids)

    wait_for(ended_though_rung, within_s=400, what="the end of both jobs", every_s=0.5)
    witness = judge(*job_ids)
    assert [job.status for job in witness.jobs] == ["succeeded"] * 2
    assert sorted(held.token for held in witness.attempts) == [1] * 4, "train and merge, once each"
