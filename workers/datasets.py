"""Checks uploaded training files row by row, in a process of its own."""

import contextlib
import logging
from typing import Any

from sqlalchemy.orm import Session

from db import blobs, files, jobs, tasks
from db.errors import LeaseLost
from db.models import File
from db.session import Database
from db.settings import DatabaseSettings
from db.tasks import Lease
from workers import children, dispatch, leases, processes
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)


def check(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    """Check the file behind `lease` and let the jobs that wait for it go on."""
    with contextlib.suppress(LeaseLost):
        _check(database, lease, settings)
        dispatch.ring("train")


def _check(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    heartbeat = leases.Heartbeat(database, lease, settings)
    paths = DatabaseSettings()
    scratch = paths.home_dir / "scratch" / f"{lease.subject_id}-{lease.token}"
    scratch.mkdir(parents=True, exist_ok=True)
    with database.read() as session:
        file = session.get(File, lease.subject_id)
    if file is None:  # deleted before its check began
        heartbeat.settle(lambda session: tasks.finish(session, lease, outcome="cancelled"))
        return
    blob = blobs.path_of(paths.blobs_dir, file.org_id, file.sha256)
    report_path = scratch / "report.json"
    argv = processes.module_command(
        "trainers.validate", str(blob), "--method", "supervised", "--report", str(report_path)
    )
    try:
        report = children.run_for_report(
            argv,
            report_path=report_path,
            marker=leases.marker(database, lease),
            heartbeat=heartbeat,
            log_path=scratch / "log.txt",
        )
    except children.ChildFailed as failure:
        logger.error("file %s: the check broke: %s", lease.subject_id, failure)
        heartbeat.settle(lambda session: _give_up_or_retry(session, lease))
        return
    heartbeat.settle(lambda session: _record(session, lease, report))


def describe_errors(report: dict[str, Any]) -> str | None:
    """The first thing wrong with a file and how much more there is; None when every row is good."""
    if not report["errors"]:
        return None
    first = report["errors"][0]
    where = f"Line {first['line']}: " if first.get("line") else ""
    more = report["n_errors"] - 1
    return f"{where}{first['message']}" + (f" ({more} more lines have errors)" if more else "")


def _record(session: Session, lease: Lease, report: dict[str, Any] | None) -> None:
    if report is None:
        tasks.requeue(session, lease, outcome="stopped", charge=False)
        return
    tasks.finish(session, lease, outcome="done")
    files.record_check(session, lease.subject_id, report=report, error=describe_errors(report))
    jobs.files_checked(session, lease.subject_id)


def _give_up_or_retry(session: Session, lease: Lease) -> None:
    if tasks.requeue(session, lease, outcome="failed", charge=True, delay_s=1.0):
        return
    message = "The file could not be checked: the check broke on every attempt."
    files.record_check(session, lease.subject_id, report={}, error=message)
    jobs.files_checked(session, lease.subject_id)
