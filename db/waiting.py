"""Why a job has not started, and when it may; nothing here changes one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import job_files, obstacles, turns
from db.models import File, Job, PipelineStage
from db.session import clock
from db.turns import Tenant
from db.work_models import Attempt, DeviceLease, Task


@dataclass(frozen=True)
class Wait:
    """What a job waits for, each with its `reason`; and when it may start, None where nobody can know."""

    position: int | None
    blocked_by: list[dict[str, Any]]
    expected_start_at: float | None


def explain(session: Session, job: Job) -> Wait | None:
    """What `job` waits for; None if it does not wait."""
    match job.status:
        case "waiting":
            return Wait(None, [*_list_stages(session, job), *_list_files(session, job)], None)
        case "validating_files":
            return Wait(None, list(_list_files(session, job)), None)
        case "paused":
            return Wait(None, [{"reason": "paused"}], None)
        case "queued":
            return _explain_queue(session, job)
    return None


def _list_stages(session: Session, job: Job) -> Iterator[dict[str, Any]]:
    rows = session.execute(
        select(PipelineStage, Job)
        .join(Job, Job.id == PipelineStage.job_id)
        .where(PipelineStage.pipeline_id == job.pipeline_id)
        .order_by(PipelineStage.position)
    ).all()
    needs = {name for row, _ in rows if row.job_id == job.id for name in row.needs.values()}
    for row, upstream in rows:
        if row.name in needs and upstream.status != "succeeded":
            yield {"reason": "stage", "id": upstream.id, "name": row.name, "status": upstream.status}


def _list_files(session: Session, job: Job) -> Iterator[dict[str, Any]]:
    for file_id in dict.fromkeys(file_id for _, file_id in job_files.list_named(job)):
        file = session.get(File, file_id)
        if file is not None and file.status == "uploaded":
            yield {"reason": "file", "id": file_id}


def _explain_queue(session: Session, job: Job) -> Wait | None:
    own = session.scalar(
        select(Task).where(Task.kind == "train", Task.subject_id == job.id, Task.status == "queued")
    )
    if own is None:
        return None  # claimed a moment ago
    before = turns.count_before(session, own)
    earlier = sum(before.values())
    nodes = _find_devices(session)
    held = sum(len(times) for times in nodes.values())
    obstacle = obstacles.find_obstacle(session, own)
    found: list[dict[str, Any]] = [] if obstacle is None else [obstacle]
    if earlier:
        found.append({"reason": "earlier_jobs", "count": earlier})
    if held:
        found.append({"reason": "devices", "needed": own.devices_needed, "held": held})
    if own.not_before > clock(session):
        found.append({"reason": "pause_after_failure", "until": int(own.not_before)})
    # Nothing stands in its way: no worker has looked yet, or none is there.
    knows = obstacle is None and own.nodes_needed == 1
    expected = _expect_start(session, own, nodes=nodes, before=before) if knows else None
    return Wait(earlier, found or [{"reason": "worker"}], expected)


def _find_devices(session: Session) -> dict[tuple[str, bool], list[float]]:
    """By node, and whether it has CPU slots: when each device that is held will be free, if one knows."""
    rows = session.execute(
        select(DeviceLease.node, DeviceLease.device, Attempt.ended_at, Job.progress)
        .join(Attempt, Attempt.id == DeviceLease.attempt_id)
        .join(Task, Task.id == Attempt.task_id)
        .join(Job, Job.id == Task.subject_id)
        .where(DeviceLease.released_at.is_(None))
    ).all()
    nodes: dict[tuple[str, bool], list[float]] = {}
    for node, device, ended_at, progress in rows:
        progress = progress or {}
        eta_s = progress.get("eta_seconds")
        # Of an attempt that is over nobody knows when its processes are gone.
        known = eta_s is not None and ended_at is None
        times = nodes.setdefault((node, device.startswith("slot:")), [])
        times.append(progress["updated_at"] + eta_s if known else inf)
    return nodes


def _expect_start(
    session: Session, own: Task, *, nodes: dict[tuple[str, bool], list[float]], before: Mapping[Tenant, int]
) -> float | None:
    """When enough devices are free for the jobs before this one and for itself.

    How long the jobs before it will take is known only of those that run: None if it must outwait others.
    """
    free_at = {node: sorted(times) for node, times in nodes.items()}
    if sum(before.values()) >= sum(len(times) for times in free_at.values()):
        return None
    starts_at = inf
    for task in [*turns.list_first(session, own.queue, before), own]:
        starts_at, node, count = min(
            ((times[n - 1], node, n) for node, times, n in _fits(free_at, task.devices_needed)),
            default=(inf, None, 0),
        )
        if node is None or starts_at == inf:
            return None
        del free_at[node][:count]
    return max(starts_at, own.not_before, clock(session))


def _fits(
    free_at: dict[tuple[str, bool], list[float]], devices_needed: int
) -> Iterator[tuple[tuple[str, bool], list[float], int]]:
    """The nodes that have devices enough, with how many a job takes: of CPU slots always one."""
    for node, times in free_at.items():
        count = min(devices_needed, 1) if node[1] else devices_needed
        if 0 < count <= len(times):
            yield node, times, count
