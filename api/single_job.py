"""A job by itself: with what lists leave out, because it takes a look at other rows and files."""

from sqlalchemy.orm import Session

from api import render
from api.diagnosis import diagnose
from api.schemas import JobObject
from api.settings import ApiSettings
from db import failures, job_queries
from db.models import Job


def show(session: Session, job: Job, *, settings: ApiSettings) -> JobObject:
    """A job, where it stands in the queue, and why it failed."""
    return render.job_object(
        job,
        queue_position=job_queries.queue_position(session, job.id),
        diagnosis=diagnose(job, failures.look_into(session, job), runs_dir=settings.runs_dir),
    )
