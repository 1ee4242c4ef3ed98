"""A small world in a test database, shorthands to move work through it, and ways to make threads meet."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select, text, update
from sqlalchemy.orm import Session

from db import claims, files, jobs, keys, retries, tasks
from db.blobs import BlobWriter
from db.models import Event, File, Job, Model
from db.new_jobs import NewJob
from db.session import Database, clock
from db.tables import Org
from db.tasks import Lease, Owner
from db.work_models import Attempt, Task

RESOLVED = {"n_epochs": 1, "batch_size": 4, "micro_batch_size": 4}
_numbers = itertools.count(1)
ERROR = {"code": "nan_loss", "message": "The loss is not a number.", "param": None}


@dataclass(frozen=True)
class World:
    """One organisation of a database, and a folder for its bytes."""

    database: Database
    home: Path
    org_id: str = keys.DEFAULT_ORG_ID

    def other(self, name: str) -> "World":
        """Another organisation in the same database."""
        org_id = f"org-{name}"
        with self.database.write() as session:
            session.add(Org(id=org_id, name=name, created_at=clock(session)))
        return World(self.database, self.home, org_id)

    def add_model(self, model_id: str = "base", **changes: Any) -> Model:
        values: dict[str, Any] = {
            "id": model_id,
            "org_id": self.org_id,
            "public": True,
            "kind": "base",
            "status": "ready",
            "source": "/models/base",
            "path": str(self.home / "models" / model_id),
            "digest": "d" * 64,
            "root_id": model_id,
            "created_at": time.time(),
        }
        model = Model(**(values | changes))
        with self.database.write() as session:
            session.add(model)
        return model

    @property
    def blobs_dir(self) -> Path:
        return self.home / "blobs"

    def upload(
        self,
        content: bytes | None = None,
        *,
        filename: str = "a.jsonl",
        purpose: str = "fine-tune",
        database: Database | None = None,
        **said: Any,
    ) -> File:
        with BlobWriter(self.blobs_dir, self.org_id) as writer:
            writer.write(f"row {next(_numbers)}".encode() if content is None else content)
            writer.sync()
            with (database or self.database).write() as session:
                return files.create(
                    session, writer, org_id=self.org_id, filename=filename, purpose=purpose, **said
                )

    def delete_file(self, file_id: str, *, database: Database | None = None) -> None:
        files.delete(database or self.database, file_id, org_id=self.org_id, blobs_dir=self.blobs_dir)

    def check(self, file_id: str, *, error: str | None = None, kind: str | None = None) -> None:
        """What a worker records after the check of a file."""
        with self.database.write() as session:
            record_check(session, file_id, error=error, kind=kind)

    def add_file(self, content: bytes | None = None, *, kind: str | None = None, **said: Any) -> str:
        """The id of a checked training file."""
        file = self.upload(content, **said)
        self.check(file.id, kind=kind)
        return file.id

    def new_job(self, training_file: str, **changes: Any) -> NewJob:
        values: dict[str, Any] = {
            "model": "base",
            "training_file": training_file,
            "validation_file": None,
            "method": "supervised",
            "spec_version": 1,
            "spec": {"method": {"type": "supervised"}},
            "resources": {"nproc_per_node": 1, "nnodes": 1},
            "seed": 7,
        }
        return NewJob(**(values | changes))

    def add_job(self, training_file: str | None = None, **changes: Any) -> Job:
        """A job; it waits in the queue unless its file is unchecked."""
        new = self.new_job(training_file or self.add_file(), **changes)
        with self.database.write() as session:
            return jobs.create(session, new, org_id=self.org_id)

    def job(self, job_id: str) -> Job:
        with self.database.read() as session:
            return jobs.get(session, job_id, org_id=self.org_id)

    def cancel(self, job_id: str) -> Job:
        with self.database.write() as session:
            return jobs.request_cancel(session, job_id, org_id=self.org_id)

    def pause(self, job_id: str) -> Job:
        with self.database.write() as session:
            return jobs.request_pause(session, job_id, org_id=self.org_id)

    def resume(self, job_id: str) -> Job:
        with self.database.write() as session:
            return jobs.resume(session, job_id, org_id=self.org_id)

    def retry(self, job_id: str) -> Job:
        with self.database.write() as session:
            old = jobs.get(session, job_id, org_id=self.org_id)
            new = self.new_job(old.training_file, validation_file=old.validation_file, priority=old.priority)
            return retries.retry(session, old, new)

    def claim(self, queue: str = "train", **changes: Any) -> Lease | None:
        """Claim as a worker does: a training job starts in the same transaction."""
        with self.database.write() as session:
            lease = claim(session, queue, **changes)
            if lease is not None and lease.kind == "train":
                jobs.start(session, lease, resolved=RESOLVED)
            return lease

    def take(self, queue: str = "train", **changes: Any) -> Lease:
        """Claim what is known to be there."""
        lease = self.claim(queue, **changes)
        assert lease is not None
        return lease

    def to_merging(self) -> tuple[Job, Lease]:
        """A trained job and the lease of its merge."""
        job = self.add_job()
        self.train(self.take())
        return job, self.take("cpu")

    def train(self, lease: Lease) -> None:
        with tasks.fenced(self.database, lease) as session:
            jobs.finish_training(session, lease, exit_={"reason": "done", "trained_tokens": 5})

    def merge(self, lease: Lease) -> Job:
        with tasks.fenced(self.database, lease) as session:
            judges = session.get_one(Job, lease.subject_id).method == "reward"
            return jobs.finish_merge(
                session,
                lease,
                path=self.home / "merged",
                adapter_path=self.home / "adapter",
                report={"digest": "e" * 64, "bytes": 1, "head": "score" if judges else "lm"},
            )

    def give_back(self, lease: Lease, *, charge: bool = True) -> None:
        with tasks.fenced(self.database, lease) as session:
            jobs.give_back(session, lease, exit_=None, charge=charge, why="The trainer was killed")

    def expire(self, lease: Lease) -> None:
        """Let the time of a lease be over, without waiting for it."""
        self.run(update(Task).where(Task.id == lease.task_id).values(lease_expires_at=1.0))

    def skip_delays(self) -> None:
        """Let the pause before a next attempt be over."""
        self.run(update(Task).values(not_before=0.0))

    def task(self, subject_id: str, kind: str = "train") -> Task:
        with self.database.read() as session:
            return session.scalars(select(Task).where(Task.subject_id == subject_id, Task.kind == kind)).one()

    def attempts(self, subject_id: str, kind: str = "train") -> list[Attempt]:
        query = (
            select(Attempt)
            .join(Task, Task.id == Attempt.task_id)
            .where(Task.subject_id == subject_id, Task.kind == kind)
            .order_by(Attempt.token)
        )
        with self.database.read() as session:
            return list(session.scalars(query))

    def events(self, job_id: str) -> list[Event]:
        with self.database.read() as session:
            return list(session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.seq)))

    def history(self, job_id: str) -> list[str]:
        """The states that the events of a job tell."""
        return [event.data["status"] for event in self.events(job_id) if "status" in event.data]

    def run(self, statement: Any) -> None:
        with self.database.write() as session:
            session.execute(statement)


def claim(session: Session, queue: str = "train", **changes: Any) -> Lease | None:
    """One claim with a default node of three slots."""
    values: dict[str, Any] = {
        "owner": Owner(node="node-1", pid=1, started_at=1.0),
        "devices": ["slot:0", "slot:1", "slot:2"],
        "shared_slot": True,
        "ttl_s": 60.0,
    }
    return claims.claim(session, queue=queue, **(values | changes))


def record_check(
    session: Session, file_id: str, *, error: str | None = None, kind: str | None = None
) -> None:
    """The finishing transaction of a file check, without its task."""
    tasks.close_waiting(session, kind="validate", subject_id=file_id)
    files.record_check(session, file_id, report={"rows": 3, "kind": kind}, error=error)
    jobs.files_checked(session, file_id)


def race(*calls: Callable[[], Any]) -> list[Any]:
    """Run `calls` at once, each in a thread of its own; their results or the exceptions they raised."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(run, call) for call in calls]
    return [future.exception() or future.result() for future in futures]


def run_against_open(
    database: Database,
    first: Callable[[Session], Any],
    second: Callable[[], Any],
    *,
    then: Callable[[Session], Any] = lambda _: None,
) -> tuple[Any, Any]:
    """Start `second` while the transaction of `first` is open; commit once `second` waits or is over.

    `then` belongs to the first transaction, right before its commit. Returns the results of `first` and
    `second`, or the exception of the latter.
    """
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            result = first(session)
            future = pool.submit(second)
            while not future.done() and not _somebody_waits(database):
                time.sleep(0.002)
            then(session)
        return result, future.exception() or future.result()


class PausedDatabase(Database):
    """Stops right before each commit until it may go on."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reached, self.may_commit = threading.Event(), threading.Event()

    @contextmanager
    def write(self) -> Iterator[Session]:
        with super().write() as session:
            yield session
            self.reached.set()
            assert self.may_commit.wait(30)

    @contextmanager
    def migrate(self) -> Iterator[Connection]:
        with super().migrate() as connection:
            yield connection
            self.reached.set()
            assert self.may_commit.wait(30)


def run_against_paused(
    database: Database, first: Callable[[Database], Any], second: Callable[[], Any]
) -> tuple[Any, Any]:
    """Like `run_against_open`, for a `first` that opens its own transaction on the database it is given."""
    paused = PausedDatabase(database.url)
    with ThreadPoolExecutor(2) as pool:
        opened = pool.submit(first, paused)
        assert paused.reached.wait(30)
        future = pool.submit(second)
        while not future.done() and not _somebody_waits(database):
            time.sleep(0.002)
        paused.may_commit.set()
    paused.dispose()
    return opened.exception() or opened.result(), future.exception() or future.result()


def _somebody_waits(database: Database) -> bool:
    if database.engine.dialect.name == "sqlite":
        return True  # one writer at a time: the second cannot have begun
    query = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with database.read() as session:
        return session.execute(query).scalar_one() > 0
