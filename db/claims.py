"""Who gets which task next: claims by compare-and-swap, of all devices that a task needs or of none."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

from sqlalchemy import CursorResult, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db import disk, nodes
from db.models import Attempt, DeviceLease, Task
from db.session import clock
from db.tasks import Lease, Owner

# As many as other claimers may snatch away between our look and our swap.
_CANDIDATES = 32


def claim(
    session: Session,
    *,
    queue: str,
    owner: Owner,
    devices: Sequence[str],
    shared_slot: bool,
    ttl_s: float,
    free_bytes: int | None = None,
) -> Lease | None:
    """Lease the first waiting task of `queue` that fits: highest priority, then oldest.

    `devices` are all devices of the node. With `shared_slot` (a node without GPUs) a task takes one slot
    whatever its number of processes; otherwise one GPU a process. Tasks that need no device take none.
    With `free_bytes` a task whose checkpoints would need more of the disk is left waiting. A node that is
    being drained gets nothing.
    """
    if nodes.is_draining(session, owner.node):
        return None
    now = clock(session)
    free = _free_devices(session, node=owner.node, devices=devices)
    waiting = select(Task).where(Task.queue == queue, Task.status == "queued", Task.not_before <= now)
    if not (shared_slot and free):  # what cannot fit must not stand before what does
        waiting = waiting.where(Task.devices_needed <= len(free))
    candidates = waiting.order_by(Task.priority.desc(), Task.created_at, Task.id).limit(_CANDIDATES)
    for task in session.scalars(candidates):
        needed = min(task.devices_needed, 1) if shared_slot else task.devices_needed
        if needed > len(free) or not _has_room(session, task, free_bytes=free_bytes):
            continue
        with suppress(IntegrityError), session.begin_nested():
            if _swap(session, task, owner=owner, expires_at=now + ttl_s):
                return _record_claim(session, task, owner=owner, devices=free[:needed])
        # Another claimer took this task, or one of these devices, a moment ago.
        free = _free_devices(session, node=owner.node, devices=devices)
    return None


def _has_room(session: Session, task: Task, *, free_bytes: int | None) -> bool:
    if free_bytes is None or task.kind != "train":
        return True
    # A new checkpoint is whole before an old one goes.
    return 2 * disk.estimate_checkpoint_bytes(session, task.subject_id) <= free_bytes


def _swap(session: Session, task: Task, *, owner: Owner, expires_at: float) -> bool:
    result = session.execute(
        update(Task)
        .where(Task.id == task.id, Task.status == "queued", Task.token == task.token)
        .values(
            status="leased",
            token=Task.token + 1,
            charged=Task.charged + 1,
            node=owner.node,
            lease_expires_at=expires_at,
        )
        .execution_options(synchronize_session=False)
    )
    return cast(CursorResult[Any], result).rowcount == 1


def _free_devices(session: Session, *, node: str, devices: Sequence[str]) -> list[str]:
    held = set(
        session.scalars(
            select(DeviceLease.device).where(DeviceLease.node == node, DeviceLease.released_at.is_(None))
        )
    )
    return [device for device in devices if device not in held]


def _record_claim(session: Session, task: Task, *, owner: Owner, devices: list[str]) -> Lease:
    now = clock(session)  # after the swap, which may have waited for the last holder to let go
    attempt = Attempt(
        task_id=task.id,
        org_id=task.org_id,
        token=task.token + 1,
        node=owner.node,
        owner_pid=owner.pid,
        owner_started_at=owner.started_at,
        started_at=now,
        events_offset=0,
    )
    session.add(attempt)
    session.flush()
    for device in devices:
        session.add(DeviceLease(node=owner.node, device=device, attempt_id=attempt.id, leased_at=now))
    session.flush()
    return Lease(
        task_id=task.id,
        attempt_id=attempt.id,
        kind=task.kind,
        subject_id=task.subject_id,
        org_id=task.org_id,
        token=attempt.token,
        devices=tuple(devices),
    )
