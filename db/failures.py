"""What is known of the end of a job that failed; nothing here changes one."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import job_files
from db.models import File, Job
from db.work_models import Attempt, Task


@dataclass(frozen=True)
class Failure:
    """How the last attempt ended, of `attempts` at the same kind of work, and the row at fault, if one is.

    `kind`, `outcome` and `exit_` are None where the job failed before any attempt.
    """

    attempts: int = 0
    kind: str | None = None
    outcome: str | None = None
    exit_: dict[str, Any] | None = None
    file_id: str | None = None
    line: int | None = None


def look_into(session: Session, job: Job) -> Failure | None:
    """What made `job` fail; None unless it has."""
    if job.status != "failed":
        return None
    rows = session.execute(
        select(Task.kind, Attempt.outcome, Attempt.exit)
        .join(Attempt, Attempt.task_id == Task.id)
        .where(Task.subject_id == job.id, Task.kind.in_(("train", "merge")))
        .order_by(Attempt.id)
    ).all()
    if not rows:
        return Failure(**_find_bad_row(session, job))
    kind, outcome, exit_ = rows[-1]
    same = sum(row.kind == kind for row in rows)
    return Failure(same, kind, outcome, exit_, **_read_place(job, exit_ or {}))


def _find_bad_row(session: Session, job: Job) -> dict[str, Any]:
    """The first row that the check of a file found fault with."""
    for _, file_id in job_files.list_named(job):
        file = session.get(File, file_id)
        errors = (file.report or {}).get("errors") if file is not None and file.status == "error" else None
        if errors:
            return {"file_id": file_id, "line": errors[0]["line"]}
    return {}


def _read_place(job: Job, exit_: dict[str, Any]) -> dict[str, Any]:
    line, position = exit_.get("line"), exit_.get("position")
    if line is None:
        return {}
    if position is not None:
        return {"file_id": job_files.mixture_of(job)[position]["file"], "line": line}
    # The trainer does not say which of the two it was.
    return {"file_id": None if job.validation_file else job.training_file, "line": line}
