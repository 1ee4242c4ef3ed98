"""Gangs: one attempt on several nodes. Its leader claims the devices of all or none; the others are called.

A member lives by its own expiry. The end of any member is the end of the attempt, and the end of the attempt
is the end of every member.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db import quarantine, tasks
from db.errors import LeaseLost
from db.session import changed_one, clock
from db.tasks import Owner
from db.work_models import Attempt, DeviceLease, GangMember, Node, Task

Health = Literal["gathering", "whole", "leaving", "broken"]
_GOING = {"leaving", "left"}


@dataclass(frozen=True)
class Member:
    """The right of a node to take part in an attempt that another node leads."""

    id: int
    attempt_id: int
    subject_id: str
    token: int
    node: str
    rank: int
    nodes: int
    devices: tuple[str, ...]
    rendezvous: str


def find_nodes(
    session: Session, *, needed: int, shared_slot: bool, seen_since: float, free: bool
) -> dict[str, list[str]]:
    """Nodes that take work and trained or looked for it lately, each with `needed` devices of the same kind.

    With `free` only devices that nobody holds count.
    """
    leases = select(DeviceLease.node, DeviceLease.device).where(DeviceLease.released_at.is_(None))
    held = {(node, device) for node, device in session.execute(leases)}
    kept_away = quarantine.reasons(session)
    alive = select(Node).where(Node.state == "active", Node.trains_at >= seen_since).order_by(Node.name)
    found = {}
    for node in session.scalars(alive):
        ids = [str(device["id"]) for device in node.devices]
        fitting = [
            each
            for each in ids
            if each.startswith("slot:") == shared_slot
            and (node.name, each) not in kept_away
            and not (free and (node.name, each) in held)
        ]
        if len(fitting) >= needed:
            found[node.name] = fitting[:needed]
    return found


def call(session: Session, attempt_id: int, partners: Sequence[str], *, expires_at: float) -> None:
    """Call nodes to an attempt; their ranks follow the leader's, which is 0."""
    for rank, node in enumerate(partners, start=1):
        session.add(
            GangMember(attempt_id=attempt_id, node=node, rank=rank, state="called", expires_at=expires_at)
        )
    session.flush()


def open_rendezvous(session: Session, attempt_id: int, rendezvous: str) -> None:
    """Say where the members meet; only now can they come."""
    session.execute(
        update(GangMember)
        .where(GangMember.attempt_id == attempt_id)
        .values(rendezvous=rendezvous)
        .execution_options(synchronize_session=False)
    )


def join(session: Session, owner: Owner, *, ttl_s: float) -> Member | None:
    """Take part in an attempt that this node was called to, if there is one."""
    now = clock(session)
    called = session.execute(
        select(GangMember, Attempt, Task)
        .join(Attempt, Attempt.id == GangMember.attempt_id)
        .join(Task, Task.id == Attempt.task_id)
        .where(
            GangMember.node == owner.node,
            GangMember.state == "called",
            GangMember.rendezvous.is_not(None),
            Attempt.ended_at.is_(None),
        )
        .limit(1)
    ).first()
    if called is None:
        return None
    row, attempt, task = called
    if not _change(session, row.id, {"called"}, state="running", expires_at=now + ttl_s):
        return None
    held = (DeviceLease.attempt_id == attempt.id, DeviceLease.node == owner.node)
    return Member(
        id=row.id,
        attempt_id=attempt.id,
        subject_id=task.subject_id,
        token=attempt.token,
        node=owner.node,
        rank=row.rank,
        nodes=task.nodes_needed,
        devices=tuple(session.scalars(select(DeviceLease.device).where(*held).order_by(DeviceLease.device))),
        rendezvous=str(row.rendezvous),
    )


def renew(session: Session, member: Member, *, ttl_s: float, leaving: bool) -> None:
    """A member's heartbeat. Raises `LeaseLost` once the attempt is over."""
    attempt = session.get_one(Attempt, member.attempt_id, populate_existing=True)
    values = {"expires_at": clock(session) + ttl_s} | ({"state": "leaving"} if leaving else {})
    alive = attempt.ended_at is None and _change(session, member.id, {"running", "leaving"}, **values)
    if not alive:
        raise LeaseLost(f"attempt {member.token} of {member.subject_id} is over")


def leave(session: Session, member: Member, *, well: bool, gone: bool = True) -> None:
    """A member has ended; its devices are free if its processes are proven gone."""
    _change(session, member.id, {"running"}, state="done" if well else "failed")
    _change(session, member.id, {"leaving"}, state="left")
    if gone:
        tasks.release_devices(session, member.attempt_id, node=member.node)


def look_after(session: Session, attempt_id: int) -> Health:
    """What the leader must know: whether all are there, somebody has to go, or somebody is gone."""
    now = clock(session)
    members = list(
        session.scalars(
            select(GangMember)
            .where(GangMember.attempt_id == attempt_id)
            .execution_options(populate_existing=True)
        )
    )
    states = {member.state for member in members}
    late = any(member.expires_at < now for member in members if member.state not in ("done", "left"))
    if late or "failed" in states:
        return "broken"
    if states & _GOING:  # it may be gone before the leader looks
        return "leaving"
    return "gathering" if "called" in states else "whole"


def was_left(session: Session, attempt_id: int) -> bool:
    """Whether a node was told to stop: the end of the attempt that it took part in is nobody's fault."""
    going = (GangMember.attempt_id == attempt_id, GangMember.state.in_(_GOING))
    return session.scalar(select(GangMember.id).where(*going).limit(1)) is not None


def rank_of(session: Session, attempt_id: int, node: str) -> int:
    """The place of a node in an attempt; 0 leads."""
    named = (GangMember.attempt_id == attempt_id, GangMember.node == node)
    return session.scalar(select(GangMember.rank).where(*named)) or 0


def _change(session: Session, member_id: int, states: set[str], **values: Any) -> bool:
    return changed_one(
        session,
        update(GangMember).where(GangMember.id == member_id, GangMember.state.in_(states)).values(**values),
    )
