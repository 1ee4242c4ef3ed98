"""A job by itself: with what lists leave out, because it takes a look at other rows and files."""

from sqlalchemy.orm import Session

from api import render
from api.diagnosis import diagnose
from api.schemas.jobs import JobObject
from api.settings import ApiSettings
from db import failures, waiting
from db.models import Job


def show(session: Session, job: Job, *, settings: ApiSettings) -> JobObject:
    """A job, what it waits for, and why it failed."""
    wait = waiting.explain(session, job)
    expected = wait.expected_start_at if wait else None
    return render.job_object(
        job,
        queue_position=wait.position if wait else None,
        blocked_by=wait.blocked_by if wait else None,
        expected_start_at=None if expected is None else int(expected),
        diagnosis=diagnose(job, failures.look_into(session, job), runs_dir=settings.runs_dir),
    )
