"""The machines that workers run on: what each offers, when it was last seen, whether it takes work."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.errors import NotFound
from db.session import changed_one, clock
from db.work_models import Attempt, DeviceLease, Node, Task


@dataclass(frozen=True)
class Device:
    """What takes one process: a GPU, or a slot of a machine that has none."""

    id: str
    kind: str
    memory_bytes: int | None = None
    driver: str | None = None


@dataclass(frozen=True)
class DeviceUse:
    """How busy a GPU is: bytes, and of the last moments the part (0 to 1) in which it computed."""

    memory_used_bytes: int
    utilization: float


Uses = dict[str, DeviceUse]  # by the device's id


@dataclass(frozen=True)
class Facts:
    """What a worker knows of its machine."""

    name: str
    address: str
    devices: tuple[Device, ...]
    slots: int
    free_bytes: int  # of the disk that holds the home
    uses: Uses = field(default_factory=dict)


def report(session: Session, facts: Facts, *, every_s: float, trains: bool) -> None:
    """Enter a node, or refresh what is known of it unless that is younger than `every_s`.

    `trains` is said by a worker that takes trainings: others call only such nodes to a gang.
    """
    now = clock(session)
    values = {
        "address": facts.address,
        "devices": [asdict(device) for device in facts.devices],
        "slots": facts.slots,
        "free_bytes": facts.free_bytes,
        "last_seen_at": now,
        "device_use": _written(facts.uses),
    }
    if trains:
        values["trains_at"] = now
    known = session.get(Node, facts.name)
    if known is None:
        with suppress(IntegrityError), session.begin_nested():  # its other workers start with this one
            session.add(Node(name=facts.name, state="active", registered_at=now, **values))
    elif (
        now - known.last_seen_at >= every_s
        or known.devices != values["devices"]
        or (trains and now - (known.trains_at or 0.0) >= every_s)
    ):
        for name, value in values.items():
            setattr(known, name, value)


def touch(session: Session, name: str, *, every_s: float, trains: bool, uses: Uses | None = None) -> bool:
    """Note that a node lives, at most once in `every_s`; whether it is being drained."""
    now = clock(session)
    seen = Node.trains_at if trains else Node.last_seen_at
    session.execute(
        update(Node)
        .where(Node.name == name, func.coalesce(seen, 0.0) <= now - every_s)
        .values(
            last_seen_at=now,
            **({"trains_at": now} if trains else {}),
            **({"device_use": _written(uses)} if uses else {}),
        )
        .execution_options(synchronize_session=False)
    )
    return is_draining(session, name)


def leave(session: Session, name: str) -> None:
    """A node's training worker was told to stop: until one reports again, no gang is to count on it."""
    session.execute(
        update(Node)
        .where(Node.name == name)
        .values(trains_at=None)
        .execution_options(synchronize_session=False)
    )


def is_draining(session: Session, name: str) -> bool:
    """Whether a node is to take no work and to give back what it has."""
    return session.scalar(select(Node.state).where(Node.name == name)) == "draining"


def set_state(session: Session, name: str, state: str) -> Node:
    """Drain a node, or let it take work again. Raises `NotFound`."""
    if not changed_one(session, update(Node).where(Node.name == name).values(state=state)):
        raise NotFound("node", name)
    return session.get_one(Node, name, populate_existing=True)


def list_all(session: Session) -> list[Node]:
    """Every node that ever reported, by name."""
    return list(session.scalars(select(Node).order_by(Node.name)))


def holders(session: Session) -> dict[tuple[str, str], str]:
    """Which subject holds which device of which node."""
    rows = session.execute(
        select(DeviceLease.node, DeviceLease.device, Task.subject_id)
        .join(Attempt, Attempt.id == DeviceLease.attempt_id)
        .join(Task, Task.id == Attempt.task_id)
        .where(DeviceLease.released_at.is_(None))
    )
    return {(node, device): subject_id for node, device, subject_id in rows}


def _written(uses: Uses) -> dict[str, object] | None:
    return {device: asdict(use) for device, use in uses.items()} or None
