"""The tables of who works on what: tasks, their attempts, the devices that these hold, and the machines."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from db import states
from db.tables import Base, BigKey, Owned, one_of, unique_where

# Tasks that others pass while too little is free. The index and the query must have the same words.
LARGE = "devices_needed > 1 OR nodes_needed > 1"


class Task(Owned, Base):
    """Work that one worker at a time may own: train, merge, validate, import or preview one subject.

    `token` is the fence: it rises with every claim, and a write on behalf of the work names the token it
    was claimed with.
    """

    __tablename__ = "tasks"
    __table_args__ = (
        one_of("kind", states.TASK_QUEUES),
        one_of("status", states.TASK_STATES),
        CheckConstraint("(status = 'leased') = (node IS NOT NULL)", name="leased_has_node"),
        CheckConstraint("(status = 'leased') = (lease_expires_at IS NOT NULL)", name="leased_has_expiry"),
        CheckConstraint("charged >= 0 AND charged <= max_attempts", name="charged"),
        UniqueConstraint("kind", "subject_id"),
        Index("ix_tasks_order", "status", "queue", "org_id", text("priority DESC"), "created_at", "id"),
        Index(
            "ix_tasks_large",
            "queue",
            "org_id",
            text("priority DESC"),
            "created_at",
            "id",
            sqlite_where=text(f"status = 'queued' AND ({LARGE})"),
            postgresql_where=text(f"status = 'queued' AND ({LARGE})"),
        ),
        Index(
            "ix_tasks_turns",
            "queue",
            "org_id",
            "claimed_at",
            sqlite_where=text("claimed_at IS NOT NULL"),
            postgresql_where=text("claimed_at IS NOT NULL"),
        ),
    )
    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    kind: Mapped[str]
    queue: Mapped[str]
    subject_id: Mapped[str]
    status: Mapped[str]
    priority: Mapped[int]
    devices_needed: Mapped[int]  # on each node
    nodes_needed: Mapped[int]
    token: Mapped[int] = mapped_column(BigInteger)
    node: Mapped[str | None]
    lease_expires_at: Mapped[float | None]
    charged: Mapped[int]
    max_attempts: Mapped[int]
    not_before: Mapped[float]
    created_at: Mapped[float]
    claimed_at: Mapped[float | None]  # last


class Attempt(Owned, Base):
    """One claim of a task, from lease to outcome: the history that proves who owned what when."""

    __tablename__ = "attempts"
    __table_args__ = (
        one_of("outcome", states.ATTEMPT_OUTCOMES),
        CheckConstraint("(ended_at IS NULL) = (outcome IS NULL)", name="ended_has_outcome"),
        UniqueConstraint("task_id", "token"),
        unique_where("uq_attempts_live", "task_id", where="ended_at IS NULL"),
    )
    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id"))
    token: Mapped[int] = mapped_column(BigInteger)
    node: Mapped[str]
    owner_pid: Mapped[int]
    owner_started_at: Mapped[float]  # seconds since boot; Unix seconds in rows of earlier releases
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    outcome: Mapped[str | None]
    exit: Mapped[dict[str, Any] | None]
    events_offset: Mapped[int] = mapped_column(BigInteger)


class DeviceLease(Base):
    """A device of a node held by an attempt, until it is proven free."""

    __tablename__ = "device_leases"
    __table_args__ = (unique_where("uq_device_leases_live", "node", "device", where="released_at IS NULL"),)
    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    node: Mapped[str]
    device: Mapped[str]
    attempt_id: Mapped[int] = mapped_column(ForeignKey("attempts.id"), index=True)
    leased_at: Mapped[float]
    released_at: Mapped[float | None]


class Node(Base):
    """A machine that workers reported. `devices` is a list of {id, kind, memory_bytes, driver}.

    device_use: of each GPU by its id {memory_used_bytes, utilization}, as of `last_seen_at`.
    trains_at: when a worker that trains last spoke there; none since the last was told to stop.
    """

    __tablename__ = "nodes"
    __table_args__ = (one_of("state", states.NODE_STATES),)
    name: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    address: Mapped[str]
    devices: Mapped[list[Any]]
    slots: Mapped[int]
    free_bytes: Mapped[int] = mapped_column(BigInteger)
    registered_at: Mapped[float]
    last_seen_at: Mapped[float]
    trains_at: Mapped[float | None]
    device_use: Mapped[dict[str, Any] | None]


class Quarantine(Base):
    """A device that nobody may use: an attempt's processes did not die, or somebody else's are on it."""

    __tablename__ = "quarantines"
    __table_args__ = (unique_where("uq_quarantines_live", "node", "device", where="released_at IS NULL"),)
    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    node: Mapped[str]
    device: Mapped[str]
    reason: Mapped[str]
    attempt_id: Mapped[int | None] = mapped_column(ForeignKey("attempts.id"))
    since: Mapped[float]
    released_at: Mapped[float | None]


class GangMember(Base):
    """A node, besides the owner's, that takes part in an attempt; `rendezvous` is where they meet."""

    __tablename__ = "gang_members"
    __table_args__ = (
        one_of("state", states.MEMBER_STATES),
        UniqueConstraint("attempt_id", "node"),
        UniqueConstraint("attempt_id", "rank"),
        Index(None, "node", "state"),
    )
    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    attempt_id: Mapped[int] = mapped_column(ForeignKey("attempts.id"))
    node: Mapped[str]
    rank: Mapped[int]
    state: Mapped[str]
    rendezvous: Mapped[str | None]
    expires_at: Mapped[float]
