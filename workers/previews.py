"""Looks at files as models and methods see them, in a process of its own, for the API that waits for it."""

import contextlib
import json
import logging
import shutil
import time
from typing import Any

from sqlalchemy.orm import Session

from db import blobs, previews, tasks
from db.errors import LeaseLost
from db.models import Model, Preview
from db.session import Database
from db.settings import DatabaseSettings
from db.tasks import Lease
from workers import children, leases, processes, shutdown
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)
_TOO_LONG = {"code": "preview_too_long", "message": "The file takes too long to look at.", "param": None}
_MODULES = {"rows": "trainers.preview", "tokens": "trainers.token_stats"}


def run(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    """Answer the question behind `lease`."""
    with contextlib.suppress(LeaseLost):
        _run(database, lease, settings)


def _run(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    heartbeat = leases.Heartbeat(database, lease, settings)
    with database.read() as session:
        preview = session.get(Preview, lease.subject_id)
        request = _describe(session, preview) if preview else None
    if preview is None or request is None:  # the file or the model was deleted meanwhile
        heartbeat.settle(lambda session: _forget(session, lease))
        return
    scratch = DatabaseSettings().home_dir / "scratch" / f"{lease.subject_id}-{lease.token}"
    scratch.mkdir(parents=True, exist_ok=True)
    failed = False
    answer = None
    give_up_at = time.monotonic() + settings.preview_limit_s
    try:
        (scratch / "request.json").write_text(json.dumps(request))
        answer = children.run_for_report(
            processes.module_command(
                _MODULES[preview.kind],
                str(scratch / "request.json"),
                f"--report={scratch / 'report.json'}",
            ),
            report_path=scratch / "report.json",
            marker=leases.marker(database, lease),
            heartbeat=heartbeat,
            log_path=scratch / "log.txt",
            extra_env={"ARROW_DEFAULT_MEMORY_POOL": "system"},  # so that what it decodes can be limited
            wants_stop=lambda _: time.monotonic() > give_up_at,
        )
        if answer is None and not shutdown.requested():
            answer = {"error": _TOO_LONG}
    except children.ChildFailed as failure:
        logger.error("preview %s broke: %s", lease.subject_id, failure)
        failed = True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    heartbeat.settle(lambda session: _record(session, lease, answer=answer, failed=failed))


def _describe(session: Session, preview: Preview) -> dict[str, Any] | None:
    """The request of the process; None where the model or the bytes are gone."""
    model = session.get(Model, preview.request["model_pk"])
    path = blobs.path_of(DatabaseSettings().blobs_dir, preview.org_id, preview.sha256)
    if model is None or model.deleted_at is not None or not path.is_file():
        return None
    asked = preview.request["asked"]
    layout = asked["layout"] | {"max_unpacked_bytes": WorkerSettings().unpacked_limit_bytes()}
    known = {"model_dir": str(model.path), "file": str(path), "sha256": preview.sha256}
    return {**known, **asked, "layout": layout}


def _forget(session: Session, lease: Lease) -> None:
    tasks.finish(session, lease, outcome="cancelled")
    previews.forget(session, lease.subject_id)


def _record(session: Session, lease: Lease, *, answer: dict[str, Any] | None, failed: bool) -> None:
    if answer is not None:
        tasks.finish(session, lease, outcome="done")
        previews.record(session, lease.subject_id, answer)
    elif not failed:
        tasks.requeue(session, lease, outcome="stopped", charge=False)
    elif not tasks.requeue(session, lease, outcome="failed", charge=True, delay_s=1.0):
        previews.fail(session, lease.subject_id)
