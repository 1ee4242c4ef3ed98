"""How the service does, as the tables tell it: totals over all tenants, for whoever watches the machines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, func, join, select, true
from sqlalchemy.orm import Session

from db import nodes, quarantine
from db.models import Deployment, Job
from db.session import clock
from db.work_models import Attempt, Node, Quarantine, Task

Values = dict[tuple[str, ...], float]
_ANY = true()


@dataclass(frozen=True)
class Measure:
    """A number by its labels. A total only rises: it counts rows that nobody deletes."""

    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[Session], Values]
    is_total: bool = False


def _count(*columns: Any, where: Any = _ANY, of: Any = None) -> Callable[[Session], Values]:
    """Rows by the values of columns; `of` is what to look at where the columns do not say."""

    def read(session: Session) -> Values:
        counted: Any = select(*columns, func.count()).where(where).group_by(*columns)
        if of is not None:
            counted = counted.select_from(of)
        return {tuple(map(str, row[:-1])): float(row[-1]) for row in session.execute(counted)}

    return read


def _attempts(*columns: Any, where: Any = _ANY) -> Callable[[Session], Values]:
    return _count(*columns, where=where, of=join(Attempt, Task, Task.id == Attempt.task_id))


def _oldest(session: Session) -> Values:
    now = clock(session)
    later = case((Task.not_before > Task.created_at, Task.not_before), else_=Task.created_at)
    rows = session.execute(
        select(Task.kind, func.min(later)).where(Task.status == "queued").group_by(Task.kind)
    )
    return {(kind,): max(0.0, now - at) for kind, at in rows}


def _by_node(read: Callable[[Node, float], float]) -> Callable[[Session], Values]:
    def values(session: Session) -> Values:
        now = clock(session)
        return {(node.name,): read(node, now) for node in nodes.list_all(session)}

    return values


def _by_device(name: str) -> Callable[[Session], Values]:
    def values(session: Session) -> Values:
        return {
            (node.name, device): float(use[name])
            for node in nodes.list_all(session)
            for device, use in (node.device_use or {}).items()
        }

    return values


def _devices(session: Session) -> Values:
    held, kept = nodes.holders(session), quarantine.reasons(session)
    found: Values = {("free",): 0.0, ("leased",): 0.0, ("quarantined",): 0.0}
    for node in nodes.list_all(session):
        for device in node.devices:
            place = (node.name, device["id"])
            state = "quarantined" if place in kept else "leased" if place in held else "free"
            found[(state,)] += 1
    return found


_REASON = Attempt.exit["reason"].as_string()

MEASURES = (
    Measure("tasks", "Work that waits or is being done.", ("kind", "status"),
            _count(Task.kind, Task.status, where=Task.status.in_(("queued", "leased")))),
    Measure("queue_oldest_seconds", "How long the oldest waiting work has waited.", ("kind",), _oldest),
    Measure("jobs", "Fine-tuning jobs by status.", ("status",), _count(Job.status)),
    Measure("claims", "Attempts that began.", ("kind",), _attempts(Task.kind), is_total=True),
    Measure("attempts", "Attempts that ended.", ("kind", "outcome"),
            _attempts(Task.kind, Attempt.outcome, where=Attempt.outcome.is_not(None)), is_total=True),
    Measure("lost_attempts", "Attempts whose worker died or fell silent.", ("kind",),
            _attempts(Task.kind, where=Attempt.outcome == "lost"), is_total=True),
    Measure("exits", "Ends of trainers, merges and imports by the reason they gave.", ("kind", "reason"),
            _attempts(Task.kind, _REASON, where=_REASON.is_not(None)), is_total=True),
    Measure("disk_full", "Attempts that ended for want of space on the disk.", (),
            _attempts(where=_REASON == "disk_full"), is_total=True),
    Measure("devices", "GPUs and slots by what is done with them.", ("state",), _devices),
    Measure("device_memory_used_bytes", "Memory of a GPU that is in use.", ("node", "device"),
            _by_device("memory_used_bytes")),
    Measure("device_utilization", "The part of the last moments in which a GPU computed: 0 to 1.",
            ("node", "device"), _by_device("utilization")),
    Measure("quarantines", "Times a device was kept from use, which nobody could prove free.",
            (), _count(of=Quarantine), is_total=True),
    Measure("node_seen_seconds", "How long ago a node's workers last spoke.", ("node",),
            _by_node(lambda node, now: max(0.0, now - node.last_seen_at))),
    Measure("node_free_bytes", "Free space on the disk that holds a node's home.", ("node",),
            _by_node(lambda node, _: float(node.free_bytes))),
    Measure("node_draining", "1 while a node takes no work.", ("node",),
            _by_node(lambda node, _: float(node.state == "draining"))),
    Measure("deployments", "Engines by state.", ("status",), _count(Deployment.status)),
)  # fmt: skip


def read_all(session: Session) -> Iterator[tuple[Measure, Values]]:
    """Every measure with its values now; one without labels has a value, if only 0."""
    for measure in MEASURES:
        values = measure.read(session)
        if not measure.labels:
            values = {(): values.get((), 0.0)}
        yield measure, values
