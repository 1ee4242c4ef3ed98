"""Who gets which task next: claims by compare-and-swap, of all devices that a task needs or of none.

Tenants take turns (`db.turns`). A task that does not fit yet is passed by later ones that do, but not for
ever: after `passing_s` the node keeps what becomes free for it. A task of several nodes is claimed on all of
them at once by the node that will lead, so that no two tasks can each hold what the other needs.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Select, literal, select, text, union_all, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db import disk, gangs, nodes, turns
from db.session import changed_one, timestamp
from db.tables import Org
from db.tasks import Lease, Owner
from db.turns import Tenant
from db.work_models import LARGE, Attempt, DeviceLease, Quarantine, Task

# First as many as other claimers may snatch away between our look and our swap; then soon all there are.
_PAGES = [16 << n for n in range(10)]
_MOST_DEVICES = 64  # that a job may ask of a node


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
    """Lease the first waiting task of `queue` that fits: tenants in turn, of each by priority, then by age.

    `devices` are all devices of the node. With `shared_slot` (a node without GPUs) a task takes one slot
    whatever its number of processes; otherwise one GPU a process. Tasks that need no device take none.
    What needs several devices and has waited for `passing_s`, and what the node could run, is passed only by
    tenants that were served longer ago than its own: by each once.
    With `free_bytes` a task whose checkpoints would need more of the disk is left waiting. A node that is
    being drained gets nothing. Of each tenant the first 16,368 tasks are looked at that the devices allow.
    """
    if nodes.is_draining(session, owner.node):
        return None
    while True:
        held, unusable = _look_at_devices(session, owner.node)
        usable = [device for device in devices if device not in unusable]
        free = [device for device in usable if device not in held]
        offer = _Offer(owner, len(usable), free, shared_slot, ttl_s, free_bytes)
        with suppress(IntegrityError):  # another claimer took one of these devices: look at what is left
            return _take_first(session, queue, offer, passing_s=passing_s)


@dataclass(frozen=True)
class _Offer:
    """What a node has to give."""

    owner: Owner
    n_usable: int  # devices, free or not
    free: list[str]
    shared_slot: bool
    ttl_s: float
    free_bytes: int | None
    partners: dict[int, dict[str, list[str]]] = field(
        default_factory=dict
    )  # by devices needed, as seen first

    def count_needed(self, task: Task) -> int:
        """Devices of a node that a task takes here."""
        return min(task.devices_needed, 1) if self.shared_slot else task.devices_needed


def _take_first(session: Session, queue: str, offer: _Offer, *, passing_s: float) -> Lease | None:
    """Lease the first task that fits. Raises IntegrityError, with nothing done, if a device is gone."""
    now = timestamp(session)
    waiting = select(Task).where(Task.queue == queue, Task.status == "queued", Task.not_before <= now)
    tenants = turns.list_tenants(session, queue)
    if not tenants:
        return None
    overdue = _find_overdue(session, waiting, tenants, offer, since=now - passing_s)
    if not (offer.shared_slot and offer.free):  # what cannot fit must not stand before what does
        waiting = waiting.where(Task.devices_needed <= len(offer.free))
    for tenant in tenants:
        if overdue is not None and not _may_pass(tenant, overdue[0]):
            continue
        own = waiting.where(Task.org_id == tenant.org_id)
        last = overdue[1] if overdue is not None and overdue[0] == tenant else None
        for task in _read(session, own, free_bytes=offer.free_bytes):
            if last is not None and turns.rank(task) > turns.rank(last):
                break
            if lease := _take(session, task, offer):
                return lease
    return None


def _read(session: Session, waiting: Select[Task], *, free_bytes: int | None) -> Iterator[Task]:
    """The tasks of one tenant by rank, in pages; not those that the disk has no room for."""
    for size in _PAGES:
        page = session.scalars(waiting.order_by(*turns.RANK).limit(size)).all()
        yield from _with_room(session, page, free_bytes=free_bytes)
        if len(page) < size:
            return
        waiting = waiting.where(turns.is_behind(page[-1]))


def _take(session: Session, task: Task, offer: _Offer) -> Lease | None:
    node, needed, expires_at = offer.owner.node, offer.count_needed(task), timestamp(session) + offer.ttl_s
    partners = _find_partners(session, task, offer)
    if len(partners) < task.nodes_needed - 1:
        return None
    with session.begin_nested():
        if not _swap(session, task, owner=offer.owner, expires_at=expires_at):
            return None  # another claimer has it
        lease = _record_claim(session, task, owner=offer.owner, leased={node: offer.free[:needed]} | partners)
        gangs.call(session, lease.attempt_id, list(partners), expires_at=expires_at)
        return lease


def _find_overdue(
    session: Session, waiting: Select[Task], tenants: list[Tenant], offer: _Offer, *, since: Any
) -> tuple[Tenant, Task] | None:
    """The first task that was passed for long enough, of the tenant that was served the longest ago.

    Not what needs more than there is, busy or not.
    """
    n_usable = _MOST_DEVICES if offer.shared_slot else offer.n_usable
    # What is small fits as soon as anything is free. Said for the index, which holds the few that are not.
    first = waiting.where(text(f"({LARGE})"), Task.devices_needed <= n_usable, Task.org_id == Org.id)
    if offer.shared_slot:  # one slot a node
        first = first.where(Task.nodes_needed > 1)
    first = first.where(Task.created_at <= since, Task.not_before <= since).order_by(*turns.RANK).limit(1)
    by_id = {tenant.org_id: tenant for tenant in tenants}
    ids = first.with_only_columns(Task.id).scalar_subquery()
    rows = session.execute(select(Org.id, ids).where(Org.id.in_(by_id))).all()
    found = [(by_id[org_id], task_id) for org_id, task_id in rows if task_id is not None]
    for tenant, task_id in sorted(found, key=lambda pair: (pair[0].served_at, pair[0].place())):
        task = session.get_one(Task, task_id)
        if _with_room(session, [task], free_bytes=offer.free_bytes) and _can_gather(session, task, offer):
            return tenant, task
    return None


def _may_pass(tenant: Tenant, of: Tenant) -> bool:
    """Whether tasks of a tenant may be claimed while devices are kept for one of another, or of its own."""
    return (tenant.served_at, tenant.first_at) <= (of.served_at, of.first_at)


def _can_gather(session: Session, task: Task, offer: _Offer) -> bool:
    """Whether there are enough nodes for a task, busy or not."""
    if task.nodes_needed == 1:
        return True
    return len(_find_nodes(session, task, offer, free=False)) >= task.nodes_needed


def _find_partners(session: Session, task: Task, offer: _Offer) -> dict[str, list[str]]:
    """The other nodes that a task could be claimed on now, with their devices; no more than it needs."""
    if task.nodes_needed == 1:
        return {}
    needed = offer.count_needed(task)
    if needed not in offer.partners:
        offer.partners[needed] = _find_nodes(session, task, offer, free=True)
    able = offer.partners[needed]
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


def _with_room(session: Session, tasks: Sequence[Task], *, free_bytes: int | None) -> Sequence[Task]:
    """Those whose checkpoints the disk has room for."""
    jobs = [task.subject_id for task in tasks if task.kind == "train"]
    if free_bytes is None or not jobs:
        return tasks
    sizes = disk.estimate_checkpoints_bytes(session, jobs)
    # A new checkpoint is whole before an old one goes.
    return [task for task in tasks if 2 * sizes.get(task.subject_id, 0) <= free_bytes]


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
            claimed_at=timestamp(session),
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
