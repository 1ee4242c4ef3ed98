"""Merges a finished adapter into the exact base it was trained on, and registers the verified result."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db import jobs
from db.errors import LeaseLost
from db.models import Job
from db.session import Database
from db.settings import DatabaseSettings
from db.tasks import Lease
from workers import children, dispatch, leases, processes, shutdown
from workers.settings import WorkerSettings
from workers.train import run_dir_of

logger = logging.getLogger(__name__)


def run(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    """Carry out the merge behind `lease`."""
    with contextlib.suppress(LeaseLost):
        _run(database, lease, settings)
        dispatch.ring("train")  # other stages of its pipeline may have waited for it


def _run(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    heartbeat = leases.Heartbeat(database, lease, settings)
    job_id = lease.subject_id
    with database.read() as session:
        trained_attempt = session.get_one(Job, job_id).trained_attempt
    assert trained_attempt is not None, "a merge is queued only by a finished training"  # noqa: S101
    run_dir = run_dir_of(job_id, trained_attempt)
    target = DatabaseSettings().models_dir / f"{job_id}-{lease.token}"
    target.parent.mkdir(parents=True, exist_ok=True)
    report_path = run_dir / "merge.json"
    failure = None
    report = None
    try:
        report = children.run_for_report(
            processes.module_command(
                "trainers.merge", str(run_dir), str(target), "--report", str(report_path)
            ),
            report_path=report_path,
            marker=leases.marker(database, lease),
            heartbeat=heartbeat,
            log_path=run_dir / "merge.log",
            wants_stop=lambda session: jobs.stop_asked(session, job_id) == "cancel",
            writable=[target.parent],
        )
    except children.ChildFailed as broken:
        failure = str(broken)
    heartbeat.settle(
        lambda session: _record(
            session, lease, report=report, failure=failure, target=target, adapter=run_dir / "output"
        )
    )


def _record(
    session: Session,
    lease: Lease,
    *,
    report: dict[str, Any] | None,
    failure: str | None,
    target: Path,
    adapter: Path,
) -> None:
    if jobs.stop_asked(session, lease.subject_id, hold=True) == "cancel":
        jobs.cancel(session, lease)
    elif report is None:
        why = failure or "The worker shuts down"
        jobs.give_back(session, lease, exit_=None, charge=not shutdown.requested(), why=why)
    elif "error" in report:
        error = report["error"] | {"param": None}
        jobs.fail(session, lease, error=error, exit_=report)
    else:
        jobs.finish_merge(session, lease, path=target, adapter_path=adapter, report=report)
