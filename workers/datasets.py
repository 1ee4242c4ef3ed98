"""Checks training files row by row, in a process of its own, after fetching those that are not here yet."""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db import blobs, files, jobs, sources, tasks
from db.blobs import BlobWriter
from db.errors import LeaseLost
from db.models import File
from db.session import Database
from db.settings import DatabaseSettings
from db.tasks import Lease
from workers import children, dispatch, hub, leases, processes
from workers.layouts import layout_of
from workers.leases import Heartbeat
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)
Outcome = Callable[[Session, Lease], None]


def check(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    """Check the file behind `lease` and let the jobs that wait for it go on."""
    with contextlib.suppress(LeaseLost):
        _check(database, lease, settings)
        dispatch.ring("train")


def _check(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    heartbeat = leases.Heartbeat(database, lease, settings)
    scratch = DatabaseSettings().home_dir / "scratch" / f"{lease.subject_id}-{lease.token}"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        outcome = _fetch_and_check(database, lease, settings, heartbeat=heartbeat, scratch=scratch)
    except children.ChildFailed as failure:
        logger.error("file %s: the check broke: %s", lease.subject_id, failure)
        heartbeat.settle(lambda session: _give_up_or_retry(session, lease))
        return
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    heartbeat.settle(lambda session: outcome(session, lease))


def _fetch_and_check(
    database: Database, lease: Lease, settings: WorkerSettings, *, heartbeat: Heartbeat, scratch: Path
) -> Outcome:
    """What is to be recorded of the file; its bytes are stored on the way if they had not come."""
    with database.read() as session:
        file = session.get(File, lease.subject_id)
    if file is None:  # deleted before its check began
        return _forget
    sha256 = file.sha256
    if not sha256:
        fetched = _fetch(file, lease, settings, database=database, heartbeat=heartbeat, scratch=scratch)
        if fetched is None:
            return partial(_record, report=None)
        if "error" in fetched:
            message = f"{fetched['error']['message']} ({fetched['error']['code']})"
            return partial(_record, report={}, error=message)
        sha256 = fetched["sha256"]
    report_path = scratch / "report.json"
    blob = blobs.path_of(DatabaseSettings().blobs_dir, file.org_id, sha256)
    if not blob.is_file():
        return partial(_record, report={}, error=blobs.describe_change(sha256))
    layout = json.dumps(dataclasses.asdict(layout_of(file)))
    argv = processes.module_command(
        "trainers.validate", str(blob), "--layout", layout, "--report", str(report_path)
    )
    report = children.run_for_report(
        argv,
        report_path=report_path,
        marker=leases.marker(database, lease),
        heartbeat=heartbeat,
        log_path=scratch / "log.txt",
        extra_env={"OMP_NUM_THREADS": "1"},  # else numpy takes memory for each core
    )
    if report and report.pop("sha256") != sha256:
        return partial(_record, report={}, error=blobs.describe_change(sha256))
    return partial(_record, report=report, error=describe_errors(report) if report else None)


def _fetch(
    file: File,
    lease: Lease,
    settings: WorkerSettings,
    *,
    database: Database,
    heartbeat: Heartbeat,
    scratch: Path,
) -> dict[str, Any] | None:
    """Store the bytes that `file.source` names: {"sha256"} or {"error"}; None when a shutdown came first."""
    assert file.source is not None, "only imported files are without bytes"  # noqa: S101
    if not settings.hub:
        return {"error": hub.DISABLED}
    rows = scratch / "rows.jsonl"
    fetched = hub.fetch_data(
        sources.parse_hub(file.source),
        to=rows,
        limit_bytes=settings.max_upload_bytes,
        scratch=scratch,
        marker=leases.marker(database, lease),
        heartbeat=heartbeat,
    )
    if fetched is None or "error" in fetched:
        return fetched
    with BlobWriter(DatabaseSettings().blobs_dir, file.org_id) as writer:
        for chunk in blobs.read_chunks(rows):
            writer.write(chunk)
        writer.sync()
        with tasks.fenced(database, lease) as session:
            kept = files.record_bytes(session, file.id, writer)
    return {"sha256": writer.sha256} if kept else None


def describe_errors(report: dict[str, Any]) -> str | None:
    """The first thing wrong with a file and how much more there is; None when it can be used."""
    if report["accepted"]:
        return None
    first = report["errors"][0]
    where = f"Line {first['line']}: " if first.get("line") else ""
    more = sum(report["reasons"].values()) - 1
    return f"{where}{first['message']}" + (f" ({more} more lines have errors)" if more else "")


def _forget(session: Session, lease: Lease) -> None:
    tasks.finish(session, lease, outcome="cancelled")


def _record(
    session: Session, lease: Lease, *, report: dict[str, Any] | None, error: str | None = None
) -> None:
    if report is None:
        tasks.requeue(session, lease, outcome="stopped", charge=False)
        return
    tasks.finish(session, lease, outcome="done")
    files.record_check(session, lease.subject_id, report=report, error=error)
    jobs.files_checked(session, lease.subject_id)


def _give_up_or_retry(session: Session, lease: Lease) -> None:
    if tasks.requeue(session, lease, outcome="failed", charge=True, delay_s=1.0):
        return
    message = "The file could not be checked: the check broke on every attempt."
    files.record_check(session, lease.subject_id, report={}, error=message)
    jobs.files_checked(session, lease.subject_id)
