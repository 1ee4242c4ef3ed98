"""Who gets which task next: claims by compare-and-swap, of all devices that a task needs or of none.

A task that does not fit yet is passed by later ones that do, but not for ever: after `passing_s` the node
keeps what becomes free for it. A task of several nodes is claimed on all of them at once by the node that
will lead, so that no two tasks can each hold what the other needs.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, literal, or_, select, text, tuple_, union_all, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db import disk, gangs, nodes
from db.session import changed_one, timestamp
from db.tasks import Lease, Owner
from db.work_models import LARGE, Attempt, DeviceLease, Quarantine, Task

# As many as other claimers may snatch away between our look and our swap.
_CANDIDATES = 16
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
    while True:
        held, unusable = _look_at_devices(session, owner.node)
        usable = [device for device in devices if device not in unusable]
        free = [device for device in usable if device not in held]
        offer = _Offer(owner, len(usable), free, shared_slot, ttl_s, free_bytes)
        waiting = _list_waiting(session, queue, offer, passing_s=passing_s)
        with suppress(IntegrityError):  # another claimer took one of these devices: look at what is left
            return _take_first(session, waiting, offer)


@dataclass(frozen=True)
class _Offer:
    """What a node has to give."""

    owner: Owner
    n_usable: int  # devices, free or not
    free: list[str]
    shared_slot: bool
    ttl_s: float
    free_bytes: int | None

    def count_needed(self, task: Task) -> int:
        """Devices of a node that a task takes here."""
        return min(task.devices_needed, 1) if self.shared_slot else task.devices_needed


def _list_waiting(session: Session, queue: str, offer: _Offer, *, passing_s: float) -> Select[Task]:
    """What may be claimed, devices of other nodes and room on the disk apart."""
    now = timestamp(session)
    waiting = select(Task).where(Task.queue == queue, Task.status == "queued", Task.not_before <= now)
    kept = _find_kept_waiting(session, waiting, offer, since=now - passing_s)
    if not (offer.shared_slot and offer.free):  # what cannot fit must not stand before what does
        waiting = waiting.where(Task.devices_needed <= len(offer.free))
    if (
        kept is not None
        and _has_room(session, kept, free_bytes=offer.free_bytes)
        and _can_gather(session, kept, offer)
    ):
        waiting = waiting.where(_is_not_after(kept))
    return waiting.order_by(*_RANK).limit(_CANDIDATES)


def _take_first(session: Session, waiting: Select[Task], offer: _Offer) -> Lease | None:
    """Lease the first task that fits. Raises IntegrityError, with nothing done, if a device is gone."""
    node, expires_at = offer.owner.node, timestamp(session) + offer.ttl_s
    for task in session.scalars(waiting):
        needed = offer.count_needed(task)
        if needed > len(offer.free) or not _has_room(session, task, free_bytes=offer.free_bytes):
            continue
        partners = _find_partners(session, task, offer)
        if len(partners) < task.nodes_needed - 1:
            continue
        with session.begin_nested():
            if not _swap(session, task, owner=offer.owner, expires_at=expires_at):
                continue  # another claimer has it
            lease = _record_claim(
                session, task, owner=offer.owner, leased={node: offer.free[:needed]} | partners
            )
            gangs.call(session, lease.attempt_id, list(partners), expires_at=expires_at)
            return lease
    return None


def _find_kept_waiting(session: Session, waiting: Select[Task], offer: _Offer, *, since: Any) -> Task | None:
    """The first task that has waited since then for more than is free, but not for more than there is."""
    n_free, n_usable = len(offer.free), _MOST_DEVICES if offer.shared_slot else offer.n_usable
    fits_later = (or_(Task.devices_needed > n_free, Task.nodes_needed > 1), Task.devices_needed <= n_usable)
    for_long = (Task.created_at <= since, Task.not_before <= since)
    # What is small fits as soon as anything is free. Said for the index, which holds the few that are not.
    large = text(f"({LARGE})")
    return session.scalars(waiting.where(large, *fits_later, *for_long).order_by(*_RANK).limit(1)).first()


def _can_gather(session: Session, task: Task, offer: _Offer) -> bool:
    """Whether there are enough nodes for a task, busy or not."""
    if task.nodes_needed == 1:
        return True
    return len(_find_nodes(session, task, offer, free=False)) >= task.nodes_needed


def _find_partners(session: Session, task: Task, offer: _Offer) -> dict[str, list[str]]:
    """The other nodes that a task could be claimed on now, with their devices; no more than it needs."""
    if task.nodes_needed == 1:
        return {}
    able = _find_nodes(session, task, offer, free=True)
    others = [node for node in able if node != offer.owner.node]
    return {node: able[node] for node in others[: task.nodes_needed - 1]}


def _find_nodes(session: Session, task: Task, offer: _Offer, *, free: bool) -> dict[str, list[str]]:
    return gangs.find_nodes(
        session,
        needed=offer.count_needed(task),
        shared_slot=offer.shared_slot,
        seen_since=timestamp(session) - offer.ttl_s,
        free=free,
    )


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


def _swap(session: Session, task: Task, *, owner: Owner, expires_at: Any) -> bool:
    # Whoever is at this task already will have it: to wait for the end of that would hold up the whole queue.
    still_free = (
        select(Task.id)
        .where(Task.id == task.id, Task.status == "queued", Task.token == task.token)
        .with_for_update(skip_locked=True)
    )
    return changed_one(
        session,
        update(Task)
        .where(Task.id.in_(still_free))
        .values(
            status="leased",
            token=Task.token + 1,
            charged=Task.charged + 1,
            node=owner.node,
            lease_expires_at=expires_at,
        ),
    )


def _look_at_devices(session: Session, node: str) -> tuple[set[str], set[str]]:
    """Devices of a node that are held by somebody, and those that nobody may use."""
    held = select(DeviceLease.device, literal(True)).where(
        DeviceLease.node == node, DeviceLease.released_at.is_(None)
    )
    unusable = select(Quarantine.device, literal(False)).where(
        Quarantine.node == node, Quarantine.released_at.is_(None)
    )
    found = session.execute(union_all(held, unusable)).all()
    return (
        {device for device, is_held in found if is_held},
        {device for device, is_held in found if not is_held},
    )


def _record_claim(session: Session, task: Task, *, owner: Owner, leased: dict[str, list[str]]) -> Lease:
    attempt = Attempt(
        task_id=task.id,
        org_id=task.org_id,
        token=task.token + 1,
        node=owner.node,
        owner_pid=owner.pid,
        owner_started_at=owner.started_at,
        started_at=timestamp(session),
        events_offset=0,
    )
    session.add(attempt)
    session.flush()
    # In one order everywhere, which the statement for all of them keeps: two claimers that each wait for the
    # other's device would never end.
    places = sorted((node, device) for node, devices in leased.items() for device in devices)
    session.add_all(
        DeviceLease(node=node, device=device, attempt_id=attempt.id, leased_at=0.0) for node, device in places
    )
    session.flush()
    # Each insert may have waited for the last holder to let go.
    held_since = update(DeviceLease).where(DeviceLease.attempt_id == attempt.id)
    session.execute(
        held_since.values(leased_at=timestamp(session)).execution_options(synchronize_session=False)
    )
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
