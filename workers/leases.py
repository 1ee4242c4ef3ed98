"""A worker's side of a lease: renewals, and what to do when the database cannot be reached."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from db import gangs, nodes, quarantine, recovery, tasks
from db.errors import LeaseLost
from db.gangs import Member
from db.session import Database, clock
from db.tasks import Lease, Owner
from db.work_models import Attempt, Task
from workers import gpus, processes, shutdown
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Heartbeat:
    """Renews one lease, with some of the caller's writes in the same transaction."""

    def __init__(
        self, database: Database, lease: Lease | Callable[[Session], None], settings: WorkerSettings
    ) -> None:
        """In place of a lease, what renews the right to go on, or raises `LeaseLost`."""
        self._database, self._settings = database, settings
        self._renew = self._renewal_of(lease) if isinstance(lease, Lease) else lease
        self._trains = not isinstance(lease, Lease) or lease.kind == "train"
        self._answered_at = time.monotonic()
        # Cancels must be seen within 5 s, whatever the heartbeat is set to.
        self.interval_s = min(settings.heartbeat_s, 2.0)

    def beat(self, write: Callable[[Session], T]) -> T | None:
        """Renew the lease and run `write` in one transaction; None while the database is away.

        Raises `LeaseLost` when another owner exists, or when the database has been away for too long.
        """
        uses = gpus.read_uses()
        try:
            with self._database.write() as session:
                self._renew(session)
                node, every_s = self._settings.node, self._settings.heartbeat_s
                if self._trains and shutdown.requested():
                    nodes.leave(session, node)  # before the lease is given back: the next claim must know
                elif nodes.touch(session, node, every_s=every_s, trains=self._trains, uses=uses):
                    shutdown.request()
                result = write(session)
        except OperationalError as error:
            away_s = time.monotonic() - self._answered_at
            logger.warning("database away for %.0f s: %s", away_s, error)
            if away_s > self._settings.database_patience_s:
                raise LeaseLost(f"the database has been away for {away_s:.0f} s") from error
            return None
        self._answered_at = time.monotonic()
        return result

    def _renewal_of(self, lease: Lease) -> Callable[[Session], None]:
        return lambda session: tasks.check(session, lease, ttl_s=self._settings.lease_ttl_s)

    def settle(self, write: Callable[[Session], None]) -> None:
        """Run the finishing transaction, waiting for the database as long as patience lasts."""
        while self.beat(lambda session: (write(session), True)[1]) is None:
            time.sleep(self.interval_s)


def marker(database: Database, lease: Lease) -> str:
    """The environment marker of everything started for `lease`."""
    return processes.marker_of(database.url, lease.kind, lease.subject_id, lease.token)


def marker_of_member(database: Database, member: Member) -> str:
    """The marker of a gang's processes on one node: two nodes may be one machine."""
    return _of_rank(processes.marker_of(database.url, "train", member.subject_id, member.token), member.rank)


def this_owner(settings: WorkerSettings) -> Owner:
    """The identity under which this process claims."""
    pid, started_at = processes.identity()
    return Owner(node=settings.node, pid=pid, started_at=started_at)


def recover_node(
    database: Database,
    node: str,
    *,
    idle: Owner | None = None,
    unkillable_s: float = 60.0,
    sweep_s: float = 5.0,
) -> None:
    """Give back the work of this node's dead workers, and free devices whose processes are proven gone.

    `idle` lives, but works on nothing: what it holds, its work broke off without settling. Devices of
    processes that are still there `unkillable_s` after their attempt's end go into quarantine.
    """
    with database.read() as session:
        orphaned = [
            (attempt.id, _marker_of_attempt(session, database, attempt, node))
            for attempt in tasks.live_attempts(session, node)
            if _is_idle(attempt, idle)
            or not processes.is_alive(attempt.owner_pid, started_at=attempt.owner_started_at)
        ]
    for attempt_id, mark in orphaned:
        # First the processes, then the lease: the next attempt must find the devices free.
        processes.sweep(mark)
        if recovery.abandon(database, attempt_id):
            logger.warning("attempt %s, on which nobody works, was given back", attempt_id)
    with database.read() as session:
        unproven = [
            (attempt, _marker_of_attempt(session, database, attempt, node))
            for attempt in tasks.unproven_attempts(session, node)
        ]
    for attempt, mark in unproven:
        _prove(database, attempt, mark, node=node, unkillable_s=unkillable_s, sweep_s=sweep_s)


def _is_idle(attempt: Attempt, idle: Owner | None) -> bool:
    return idle is not None and (attempt.owner_pid, attempt.owner_started_at) == (idle.pid, idle.started_at)


def _prove(
    database: Database, attempt: Attempt, mark: str, *, node: str, unkillable_s: float, sweep_s: float
) -> None:
    gone = processes.sweep(mark, wait_s=sweep_s)
    with database.write() as session:
        if gone:
            tasks.release_devices(session, attempt.id, node=node)
            quarantine.lift(session, node, attempt_id=attempt.id)
        elif (attempt.ended_at or 0.0) + unkillable_s < clock(session):
            for device in quarantine.put_attempt(session, attempt, node):
                logger.error("%s is quarantined: processes of attempt %s do not die", device, attempt.id)


def _marker_of_attempt(session: Session, database: Database, attempt: Attempt, node: str) -> str:
    task = session.get_one(Task, attempt.task_id)
    marker = processes.marker_of(database.url, task.kind, task.subject_id, attempt.token)
    return _of_rank(marker, gangs.rank_of(session, attempt.id, node))


def _of_rank(marker: str, rank: int) -> str:
    return f"{marker}/{rank}" if rank else marker
