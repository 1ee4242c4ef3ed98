"""Jobs that try again what others did not finish."""

from dataclasses import replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import jobs
from db.errors import Conflict
from db.models import Job
from db.new_jobs import NewJob
from db.work_models import Attempt, Task

# How many rows pass at once changes no sum but its order.
_FREE = ("micro_batch_size",)


def retry(session: Session, old: Job, new: NewJob) -> Job:
    """Accept a new job in place of one that did not succeed, which stays as it is.

    Raises `Conflict` with `job_not_retryable` for any other, and whatever `jobs.create` raises.
    """
    if old.status not in ("failed", "cancelled"):
        message = f"Job '{old.id}' is {old.status}; only failed and cancelled jobs are tried again."
        raise Conflict("job_not_retryable", message)
    return jobs.create(session, replace(new, retry_of=old.id), org_id=old.org_id)


def is_same_work(job: Job, other: Job) -> bool:
    """Whether a job may go on from the checkpoints of another."""
    return _describe(job) == _describe(other)


def list_attempts(session: Session, job_id: str) -> list[int]:
    """The tokens of the attempts at the training of a job, newest first."""
    return list(
        session.scalars(
            select(Attempt.token)
            .join(Task, Task.id == Attempt.task_id)
            .where(Task.kind == "train", Task.subject_id == job_id)
            .order_by(Attempt.token.desc())
        )
    )


def _describe(job: Job) -> tuple[Any, ...]:
    resolved = {name: value for name, value in (job.resolved or {}).items() if name not in _FREE}
    files = job.training_file, job.validation_file, job.spec.get("training_files")
    return job.method, resolved, job.seed, job.model_pk, job.resources, files
