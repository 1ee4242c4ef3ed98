"""Copies a trainer's events into the database, each exactly once."""

import json
import logging
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db import checkpoints, events, jobs
from db.models import Job
from db.tasks import Lease
from db.work_models import Attempt

logger = logging.getLogger(__name__)
_MAX_BYTES = 256 * 1024  # of one transaction


class EventCopier:
    """Reads `events.jsonl` of a run from where the attempt's row says; both move in one transaction."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / "events.jsonl"

    def copy(self, session: Session, lease: Lease) -> bool:
        """Copy what is new, at most 256 KiB of it. True if there was anything. Call under the lease."""
        attempt = session.get_one(Attempt, lease.attempt_id)
        if not self._path.is_file():
            return False
        with self._path.open("rb") as source:
            source.seek(attempt.events_offset)
            chunk = source.read(_MAX_BYTES)
        whole = chunk[: chunk.rfind(b"\n") + 1]  # a line still being written waits
        if not whole:
            return False
        job = session.get_one(Job, lease.subject_id)
        for line in whole.splitlines():
            self._apply(session, job, json.loads(line))
        attempt.events_offset += len(whole)
        session.flush()
        return True

    def _apply(self, session: Session, job: Job, record: dict[str, Any]) -> None:
        match record["type"]:
            case "phase":
                jobs.set_phase(session, job, record["phase"])
            case "message":
                events.add(
                    session, job, record["message"], level=record["level"], data=record.get("data") or {}
                )
            case "metrics":
                self._apply_metrics(session, job, record)
            case "checkpoint":
                checkpoints.record(
                    session,
                    job,
                    step=record["step"],
                    path=self._run_dir / record["path"],
                    manifest_sha256=record["manifest_sha256"],
                    metrics=record["metrics"],
                )
                checkpoints.forget_missing(session, job)
                events.add(session, job, f"Checkpoint created at step {record['step']}")
            case unknown:
                logger.warning("job %s: the trainer wrote an event of unknown type %r", job.id, unknown)

    def _apply_metrics(self, session: Session, job: Job, record: dict[str, Any]) -> None:
        step, total, data = record["step"], record["total_steps"], record["data"]
        events.add(
            session,
            job,
            events.describe_metrics(step, total, data),
            type_="metrics",
            data={"step": step, "total_steps": total, **data},
        )
        step_s = data.get("step_time_s")
        jobs.set_progress(
            session,
            job,
            {
                "step": step,
                "total_steps": total,
                "percent": round(100 * step / total, 1) if total else None,
                "tokens_per_s": data.get("tokens_per_s"),
                "eta_seconds": round((total - step) * step_s, 1) if step_s is not None else None,
            },
        )
