"""Who gets which task next: claims by compare-and-swap, of all devices that a task needs or of none.

A task that does not fit yet is passed by later ones that do, but not for ever: after `passing_s` the node
keeps what becomes free for it. A task of several nodes is claimed on all of them at once by the node that
will lead, so that no two tasks can each hold what the other needs.
"""

from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, Select, and_, or_, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db import disk, gangs, nodes, quarantine
from db.models import Attempt, DeviceLease, Task
from db.session import clock
from db.tasks import Lease, Owner

# As many as other claimers may snatch away between our look and our swap.
_CANDIDATES = 32
_MOST_DEVICES = 64  # that a job may ask of a node
_RANK = (Task.priority.desc(), Task.created_at, Task.id)


def claim(
    session: Session,
    *,
    queue: str,
    owner: Owner,
    devices: Sequence[str],
    shared_slot: bool,
    ttl_s: float,
    passing_s: float = 60.0,
    free_bytes: int | None = None,
) -> Lease | None:
    """Lease the first waiting task of `queue` that fits: highest priority, then oldest.

    `devices` are all devices of the node. With `shared_slot` (a node without GPUs) a task takes one slot
    whatever its number of processes; otherwise one GPU a process. Tasks that need no device take none.
    Nothing passes a task that has waited for `passing_s` and that the node could run.
    With `free_bytes` a task whose checkpoints would need more of the disk is left waiting. A node that is
    being drained gets nothing.
    """
    if nodes.is_draining(session, owner.node):
        return None
    now = clock(session)
    seen_since = now - ttl_s
    waiting = select(Task).where(Task.queue == queue, Task.status == "queued", Task.not_before <= now)
    kept_away = quarantine.reasons(session)
    devices = [device for device in devices if (owner.node, device) not in kept_away]
    free = _free_devices(session, node=owner.node, devices=devices)
    usable = _MOST_DEVICES if shared_slot else len(devices)
    kept = _find_kept_waiting(session, waiting, free=len(free), usable=usable, since=now - passing_s)
    if not (shared_slot and free):  # what cannot fit must not stand before what does
        waiting = waiting.where(Task.devices_needed <= len(free))
    if (
        kept is not None
        and _has_room(session, kept, free_bytes=free_bytes)
        and _can_gather(session, kept, shared_slot=shared_slot, seen_since=seen_since)
    ):
        waiting = waiting.where(_is_not_after(kept))
    for task in session.scalars(waiting.order_by(*_RANK).limit(_CANDIDATES)):
        needed = min(task.devices_needed, 1) if shared_slot else task.devices_needed
        if needed > len(free) or not _has_room(session, task, free_bytes=free_bytes):
            continue
        partners = _find_partners(
            session, task, leader=owner.node, needed=needed, shared_slot=shared_slot, seen_since=seen_since
        )
        if len(partners) < task.nodes_needed - 1:
            continue
        try:
            with session.begin_nested():
                if not _swap(session, task, owner=owner, expires_at=now + ttl_s):
                    continue  # another claimer has it
                leased = {owner.node: free[:needed]} | partners
                lease = _record_claim(session, task, owner=owner, leased=leased)
                gangs.call(session, lease.attempt_id, list(partners), expires_at=now + ttl_s)
                return lease
        except IntegrityError:  # another claimer took one of these devices a moment ago: look at what is left
            return claim(
                session,
                queue=queue,
                owner=owner,
                devices=devices,
                shared_slot=shared_slot,
                ttl_s=ttl_s,
                passing_s=passing_s,
                free_bytes=free_bytes,
            )
    return None


def _find_kept_waiting(
    session: Session, waiting: Select[Task], *, free: int, usable: int, since: float
) -> Task | None:
    """The first task that has waited since then for more than is free, but not for more than there is."""
    fits_later = (or_(Task.devices_needed > free, Task.nodes_needed > 1), Task.devices_needed <= usable)
    for_long = (Task.created_at <= since, Task.not_before <= since)
    return session.scalars(waiting.where(*fits_later, *for_long).order_by(*_RANK).limit(1)).first()


def _can_gather(session: Session, task: Task, *, shared_slot: bool, seen_since: float) -> bool:
    """Whether there are enough nodes for a task, busy or not."""
    if task.nodes_needed == 1:
        return True
    needed = 1 if shared_slot else task.devices_needed
    able = gangs.find_nodes(
        session, needed=needed, shared_slot=shared_slot, seen_since=seen_since, free=False
    )
    return len(able) >= task.nodes_needed


def _find_partners(
    session: Session, task: Task, *, leader: str, needed: int, shared_slot: bool, seen_since: float
) -> dict[str, list[str]]:
    """The other nodes that a task could be claimed on now, with their devices; no more than it needs."""
    if task.nodes_needed == 1:
        return {}
    able = gangs.find_nodes(session, needed=needed, shared_slot=shared_slot, seen_since=seen_since, free=True)
    others = [node for node in able if node != leader]
    return {node: able[node] for node in others[: task.nodes_needed - 1]}


def _is_not_after(kept: Task) -> ColumnElement[bool]:
    """What may be claimed while devices are kept for a task: what is not behind it, and what needs none."""
    older = tuple_(Task.created_at, Task.id) <= tuple_(kept.created_at, kept.id)
    return or_(
        Task.devices_needed == 0, Task.priority > kept.priority, and_(Task.priority == kept.priority, older)
    )


def _has_room(session: Session, task: Task, *, free_bytes: int | None) -> bool:
    if free_bytes is None or task.kind != "train":
        return True
    # A new checkpoint is whole before an old one goes.
    return 2 * disk.estimate_checkpoint_bytes(session, task.subject_id) <= free_bytes


def _swap(session: Session, task: Task, *, owner: Owner, expires_at: float) -> bool:
    # Whoever is at this task already will have it: to wait for the end of that would hold up the whole queue.
    still_free = (
        select(Task.id)
        .where(Task.id == task.id, Task.status == "queued", Task.token == task.token)
        .with_for_update(skip_locked=True)
    )
    result = session.execute(
        update(Task)
        .where(Task.id.in_(still_free))
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


def _record_claim(session: Session, task: Task, *, owner: Owner, leased: dict[str, list[str]]) -> Lease:
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
    # In one order everywhere: two claimers that each wait for the other's device would never end.
    places = sorted((node, device) for node, devices in leased.items() for device in devices)
    rows = [
        DeviceLease(node=node, device=device, attempt_id=attempt.id, leased_at=now) for node, device in places
    ]
    for row in rows:
        session.add(row)
        session.flush()
    held_since = clock(session)  # an insert may have waited for the last holder to let go
    for row in rows:
        row.leased_at = held_since
    session.flush()
    return Lease(
        task_id=task.id,
        attempt_id=attempt.id,
        kind=task.kind,
        subject_id=task.subject_id,
        org_id=task.org_id,
        token=attempt.token,
        devices=tuple(leased[owner.node]),
        nodes=task.nodes_needed,
    )
