"""Who may work on what: claims by compare-and-swap, leases that expire, fence tokens that only rise.

A task is one unit of work (train, merge, validate, import, preview). Whoever claims it gets a `Lease` whose
token every later write must name; a write under an old token changes nothing and raises `LeaseLost`.
Lock order everywhere: the task row first, then the row of its subject.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, exists, select, text, update
from sqlalchemy.orm import Session

from db.errors import LeaseLost
from db.session import Database, changed_one, clock, timestamp
from db.states import TASK_QUEUES
from db.work_models import Attempt, DeviceLease, Task


@dataclass(frozen=True)
class Owner:
    """A worker process: its node and the identity of the process (a pid alone may be reused).

    started_at: seconds since the boot of its machine.
    """

    node: str
    pid: int
    started_at: float


@dataclass(frozen=True)
class Lease:
    """The right to work on a task until it expires or is taken away."""

    task_id: int
    attempt_id: int
    kind: str
    subject_id: str
    org_id: str
    token: int
    devices: tuple[str, ...]  # of the owner's node
    nodes: int = 1


def enqueue(
    session: Session,
    *,
    kind: str,
    subject_id: str,
    org_id: str,
    max_attempts: int = 3,
    priority: int = 0,
    devices_needed: int = 0,
    nodes_needed: int = 1,
) -> Task:
    """Add a task for `subject_id`; at most one of a kind may exist for a subject."""
    now = clock(session)
    task = Task(
        kind=kind,
        queue=TASK_QUEUES[kind],
        subject_id=subject_id,
        org_id=org_id,
        status="queued",
        priority=priority,
        devices_needed=devices_needed,
        nodes_needed=nodes_needed,
        token=0,
        charged=0,
        max_attempts=max_attempts,
        not_before=now,
        created_at=now,
    )
    session.add(task)
    session.flush()
    return task


def waiting(session: Session, queue: str) -> bool:
    """Whether a task of `queue` could be claimed now, devices apart."""
    now = clock(session)
    return bool(
        session.scalar(
            select(exists().where(Task.queue == queue, Task.status == "queued", Task.not_before <= now))
        )
    )


def check(session: Session, lease: Lease, *, ttl_s: float | None = None) -> None:
    """Assert in this transaction that `lease` still owns its task, and lock the task until the commit.

    With `ttl_s` the lease is renewed. Raises `LeaseLost`.
    """
    values: dict[str, Any] = {"node": Task.node}
    if ttl_s is not None:
        values["lease_expires_at"] = timestamp(session) + ttl_s
    held = changed_one(
        session,
        update(Task)
        .where(Task.id == lease.task_id, Task.status == "leased", Task.token == lease.token)
        .values(**values),
    )
    if not held:
        raise LeaseLost(f"{lease.kind} of {lease.subject_id}: token {lease.token} is no longer the owner's")


@contextmanager
def fenced(database: Database, lease: Lease) -> Iterator[Session]:
    """A write transaction that happens only while `lease` holds."""
    with database.write() as session:
        check(session, lease)
        yield session


def finish(session: Session, lease: Lease, *, outcome: str, exit_: dict[str, Any] | None = None) -> None:
    """Close the task and its attempt and free its devices. Call inside `fenced`."""
    _end_attempt(session, lease.attempt_id, outcome=outcome, exit_=exit_)
    release_devices(session, lease.attempt_id)
    _leave(session, lease.task_id, status="closed")


def requeue(
    session: Session,
    lease: Lease,
    *,
    outcome: str,
    charge: bool,
    delay_s: float = 0.0,
    exit_: dict[str, Any] | None = None,
) -> bool:
    """Give the task back. With `charge` the attempt counts; returns False when none is left (task closed)."""
    _end_attempt(session, lease.attempt_id, outcome=outcome, exit_=exit_)
    release_devices(session, lease.attempt_id)
    return _back_to_queue(session, lease.task_id, charge=charge, delay_s=delay_s)


def close_waiting(session: Session, *, kind: str, subject_id: str) -> bool:
    """Close the task of `subject_id` if nobody works on it; False when somebody does, or claims it right now.

    Waits for no lock, so that it may be called with the subject's row locked.
    """
    waiting = (
        select(Task.id)
        .where(Task.kind == kind, Task.subject_id == subject_id, Task.status == "queued")
        .with_for_update(skip_locked=True)
    )
    return changed_one(session, update(Task).where(Task.id.in_(waiting)).values(status="closed"))


def reopen(session: Session, *, kind: str, subject_id: str) -> bool:
    """Let a closed task wait again, behind those that wait already. False if it is not closed."""
    return changed_one(
        session,
        update(Task)
        .where(Task.kind == kind, Task.subject_id == subject_id, Task.status == "closed")
        .values(status="queued", created_at=timestamp(session)),
    )


def forget_closed(session: Session, *, kind: str, before: float) -> None:
    """Drop the closed tasks of a kind that were made before a time, with their attempts."""
    old = select(Task.id).where(Task.kind == kind, Task.status == "closed", Task.created_at < before)
    for entity, column in ((Attempt, Attempt.task_id), (Task, Task.id)):
        session.execute(delete(entity).where(column.in_(old)).execution_options(synchronize_session=False))


def expired(session: Session, *, ttl_s: float) -> list[Lease]:
    """Leases that ran out.

    A database that was itself down for a while expires nobody until a TTL after its start.
    """
    now = clock(session)
    if session.get_bind().dialect.name == "postgresql":
        up_since = session.execute(text("SELECT extract(epoch FROM pg_postmaster_start_time())")).scalar_one()
        if now < float(up_since) + ttl_s:
            return []
    return _live_leases(session, Task.lease_expires_at < now)


def live_attempts(session: Session, node: str) -> list[Attempt]:
    """Attempts of `node` that nobody has ended."""
    return list(session.scalars(select(Attempt).where(Attempt.node == node, Attempt.ended_at.is_(None))))


def lease_of(session: Session, attempt_id: int) -> Lease | None:
    """The live lease behind an attempt, for taking it away."""
    found = _live_leases(session, Attempt.id == attempt_id)
    return found[0] if found else None


def take_away(session: Session, lease: Lease, *, only_expired: bool = False) -> bool | None:
    """Declare the owner lost. True: the task waits again. False: no attempt is left. None: already gone.

    With `only_expired` an owner that renewed the lease a moment ago keeps it (None). The attempt's devices
    stay leased until the node proves them free (`release_devices`).
    """
    try:
        check(session, lease)
    except LeaseLost:
        return None
    expires_at = session.scalars(select(Task.lease_expires_at).where(Task.id == lease.task_id)).one()
    if only_expired and expires_at is not None and expires_at >= clock(session):
        return None
    _end_attempt(session, lease.attempt_id, outcome="lost", exit_=None)
    return _back_to_queue(session, lease.task_id, charge=True, delay_s=0.0)


def unproven_attempts(session: Session, node: str) -> list[Attempt]:
    """Ended attempts that still hold devices of `node`: sweep their processes, then `release_devices`."""
    held = (DeviceLease.node == node, DeviceLease.released_at.is_(None))
    holds = exists().where(DeviceLease.attempt_id == Attempt.id, *held)
    return list(session.scalars(select(Attempt).where(Attempt.ended_at.is_not(None), holds)))


def release_devices(session: Session, attempt_id: int, *, node: str | None = None) -> None:
    """Mark the devices of an attempt on a node, by default its owner's, as proven free."""
    owners = select(Attempt.node).where(Attempt.id == attempt_id).scalar_subquery()
    session.execute(
        update(DeviceLease)
        .where(
            DeviceLease.attempt_id == attempt_id,
            DeviceLease.node == (node or owners),
            DeviceLease.released_at.is_(None),
        )
        .values(released_at=timestamp(session))
        .execution_options(synchronize_session=False)
    )


def keep_devices(session: Session, lease: Lease) -> None:
    """Take back, in the transaction that ends an attempt, that its devices are free: it is not proven."""
    session.execute(
        update(DeviceLease)
        .where(DeviceLease.attempt_id == lease.attempt_id, DeviceLease.device.in_(lease.devices))
        .values(released_at=None)
        .execution_options(synchronize_session=False)
    )


def _live_leases(session: Session, *conditions: Any) -> list[Lease]:
    rows = session.execute(
        select(Task, Attempt)
        .join(Attempt, (Attempt.task_id == Task.id) & (Attempt.token == Task.token))
        .where(Task.status == "leased", Attempt.ended_at.is_(None), *conditions)
    ).all()
    return [
        Lease(
            task_id=task.id,
            attempt_id=attempt.id,
            kind=task.kind,
            subject_id=task.subject_id,
            org_id=task.org_id,
            token=task.token,
            devices=(),
        )
        for task, attempt in rows
    ]


def _end_attempt(session: Session, attempt_id: int, *, outcome: str, exit_: dict[str, Any] | None) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.id == attempt_id)
        .values(ended_at=timestamp(session), outcome=outcome, exit=exit_)
        .execution_options(synchronize_session=False)
    )


def _back_to_queue(session: Session, task_id: int, *, charge: bool, delay_s: float) -> bool:
    task = session.get_one(Task, task_id, populate_existing=True)
    charged = task.charged if charge else task.charged - 1
    if charged >= task.max_attempts:
        _leave(session, task_id, status="closed")
        return False
    _leave(session, task_id, status="queued", charged=charged, not_before=timestamp(session) + delay_s)
    return True


def _leave(session: Session, task_id: int, **values: Any) -> None:
    session.execute(
        update(Task)
        .where(Task.id == task_id)
        .values(node=None, lease_expires_at=None, **values)
        .execution_options(synchronize_session=False)
    )
