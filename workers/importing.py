"""Imports base models: copied or converted, digested and checked by a trainer process."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db import registry, tasks
from db.errors import LeaseLost
from db.models import Model
from db.session import Database
from db.settings import DatabaseSettings
from db.tasks import Lease
from workers import children, leases, processes
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)


def run(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    """Carry out the import behind `lease`."""
    with contextlib.suppress(LeaseLost):
        _run(database, lease, settings)


def _run(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    heartbeat = leases.Heartbeat(database, lease, settings)
    model_pk = int(lease.subject_id)
    with database.read() as session:
        source = Path(session.get_one(Model, model_pk).source)
    if not settings.may_import(source):
        report: dict[str, Any] | None = {
            "error": {
                "code": "import_not_allowed",
                "message": f"'{source}' is not under a folder of RESIDENCY_IMPORT_DIRS on the worker.",
            }
        }
        heartbeat.settle(lambda session: _record(session, lease, model_pk, report=report, target=source))
        return
    target = DatabaseSettings().models_dir / f"base-{model_pk}-{lease.token}"
    target.parent.mkdir(parents=True, exist_ok=True)
    report_path = target.with_suffix(".json")
    try:
        report = children.run_for_report(
            processes.module_command(
                "trainers.importer", str(source), str(target), "--report", str(report_path)
            ),
            report_path=report_path,
            marker=leases.marker(database, lease),
            heartbeat=heartbeat,
            log_path=target.with_suffix(".log"),
        )
    except children.ChildFailed as failure:
        logger.error("import of model %s broke: %s", model_pk, failure)
        report = {"error": {"code": "import_failed", "message": f"The import broke: {failure}"}}
    heartbeat.settle(lambda session: _record(session, lease, model_pk, report=report, target=target))


def _record(
    session: Session, lease: Lease, model_pk: int, *, report: dict[str, Any] | None, target: Path
) -> None:
    if report is None:
        tasks.requeue(session, lease, outcome="stopped", charge=False)
    elif "error" in report:
        tasks.finish(session, lease, outcome="failed", exit_=report)
        error = report["error"]
        registry.fail_import(session, model_pk, code=error["code"], message=error["message"])
    else:
        tasks.finish(session, lease, outcome="done", exit_=report)
        registry.record_import(session, model_pk, path=target, report=report)
