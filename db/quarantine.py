"""Devices that nobody may use, because it could not be proven that nobody does."""

from contextlib import suppress

from sqlalchemy import exists, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.errors import NotFound
from db.session import clock
from db.work_models import Attempt, DeviceLease, Quarantine


def put(session: Session, node: str, device: str, *, reason: str, attempt_id: int | None = None) -> bool:
    """Keep a device from every claim; False if it is kept already."""
    with suppress(IntegrityError), session.begin_nested():
        session.add(
            Quarantine(node=node, device=device, reason=reason, attempt_id=attempt_id, since=clock(session))
        )
        session.flush()
        return True
    return False


def put_attempt(session: Session, attempt: Attempt, node: str) -> list[str]:
    """Keep the devices that an ended attempt holds on a node; those that were not kept before."""
    held = (DeviceLease.attempt_id == attempt.id, DeviceLease.node == node, DeviceLease.released_at.is_(None))
    return [
        device
        for device in session.scalars(select(DeviceLease.device).where(*held))
        if put(session, node, device, reason="its processes do not die", attempt_id=attempt.id)
    ]


def lift(session: Session, node: str, *, attempt_id: int | None = None, device: str | None = None) -> None:
    """The reason is gone: the processes of an attempt, or those of somebody else on a device."""
    of = Quarantine.attempt_id == attempt_id if device is None else Quarantine.device == device
    _close(session, node, of)


def release(session: Session, node: str, device: str) -> None:
    """An admin vouches for a device: no attempt that is over holds it any more. Raises `NotFound`."""
    if (node, device) not in reasons(session):
        raise NotFound("quarantined device", f"{node}/{device}")
    _close(session, node, Quarantine.device == device)
    over = exists().where(Attempt.id == DeviceLease.attempt_id, Attempt.ended_at.is_not(None))
    session.execute(
        update(DeviceLease)
        .where(DeviceLease.node == node, DeviceLease.device == device)
        .where(DeviceLease.released_at.is_(None), over)
        .values(released_at=clock(session))
        .execution_options(synchronize_session=False)
    )


def reasons(session: Session) -> dict[tuple[str, str], str]:
    """Every device that is kept from use, and why."""
    kept = select(Quarantine.node, Quarantine.device, Quarantine.reason).where(
        Quarantine.released_at.is_(None)
    )
    return {(node, device): reason for node, device, reason in session.execute(kept)}


def busy_by_others(session: Session, node: str) -> set[str]:
    """Devices of a node that are kept because somebody else used them."""
    kept = (Quarantine.node == node, Quarantine.attempt_id.is_(None), Quarantine.released_at.is_(None))
    return set(session.scalars(select(Quarantine.device).where(*kept)))


def _close(session: Session, node: str, which: object) -> None:
    session.execute(
        update(Quarantine)
        .where(Quarantine.node == node, Quarantine.released_at.is_(None), which)  # type: ignore[arg-type]
        .values(released_at=clock(session))
        .execution_options(synchronize_session=False)
    )
