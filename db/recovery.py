"""What happens to work whose owner is gone."""

from sqlalchemy.orm import Session

from db import files, jobs, previews, registry, tasks
from db.session import Database
from db.tasks import Lease


def reap(database: Database, *, ttl_s: float) -> int:
    """Take expired leases away, one short transaction each. Returns how many."""
    with database.read() as session:
        leases = tasks.expired(session, ttl_s=ttl_s)
    return sum(_take(database, lease, "Worker lost (no heartbeat)", only_expired=True) for lease in leases)


def abandon(database: Database, attempt_id: int) -> bool:
    """Take the lease of an attempt that its owner is known not to work on, without waiting for its end."""
    with database.read() as session:
        lease = tasks.lease_of(session, attempt_id)
    return lease is not None and _take(database, lease, "Worker process died or broke off")


def _take(database: Database, lease: Lease, why: str, *, only_expired: bool = False) -> bool:
    with database.write() as session:
        again = tasks.take_away(session, lease, only_expired=only_expired)
        if again is None:
            return False
        _tell_subject(session, lease, again=again, why=why)
        return True


def _tell_subject(session: Session, lease: Lease, *, again: bool, why: str) -> None:
    if lease.kind in ("train", "merge"):
        jobs.after_interruption(session, lease, again=again, why=why)
    elif again:
        return
    elif lease.kind == "validate":
        message = "The file could not be checked: the check died on every attempt."
        files.record_check(session, lease.subject_id, report={}, error=message)
        jobs.files_checked(session, lease.subject_id)
    elif lease.kind == "preview":
        previews.fail(session, lease.subject_id)
    elif lease.kind == "import":
        registry.fail_import(
            session, int(lease.subject_id), code="worker_lost", message="The import died on every attempt."
        )
