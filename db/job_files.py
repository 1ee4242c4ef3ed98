"""The files that a job reads: whether it may, and whether they hold what its method learns from."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.errors import Conflict, NotFound
from db.models import File, Job
from db.new_jobs import NewJob
from db.scope import scoped

PARAMS = ("training_file", "validation_file")


def hold(session: Session, asked: NewJob | Job, *, org_id: str) -> dict[str, File]:
    """The files of a job by their parameter, kept from changing until the commit.

    Raises `NotFound` for an unknown file and `Conflict` for one that the job cannot use.
    """
    held = {param: _hold(session, file_id, org_id=org_id) for param, file_id in _named(asked)}
    for param, file in held.items():
        if file.purpose != "fine-tune":
            message = f"File '{file.id}' has the purpose '{file.purpose}'."
            raise Conflict("invalid_file_purpose", message, param=param)
        if file.status == "error":
            message = f"File '{file.id}' is invalid: {file.status_details}"
            raise Conflict(f"invalid_{param}", message, param=param)
        misfit = _describe_misfit(file, asked)
        if misfit is not None:
            raise Conflict(f"invalid_{param}", misfit, param=param)
    return held


def hold_all(session: Session, job_ids: list[str]) -> None:
    """Keep the files of several jobs from changing until the commit."""
    jobs = session.scalars(select(Job).where(Job.id.in_(job_ids)))
    file_ids = {file_id for job in jobs for _, file_id in _named(job)}
    held = select(File).where(File.id.in_(file_ids)).order_by(File.id).with_for_update(read=True)
    session.scalars(held.execution_options(populate_existing=True)).all()


def find_error(session: Session, job: Job) -> dict[str, Any] | None:
    """Why the job cannot run on its files, as far as they are checked: {code, message, param}."""
    for param, file_id in _named(job):
        file = session.get(File, file_id)
        if file is None:
            continue
        message = file.status_details if file.status == "error" else _describe_misfit(file, job)
        if message is not None or file.status == "error":
            return {"code": f"invalid_{param}", "message": message, "param": param}
    return None


def all_checked(session: Session, job: Job) -> bool:
    """Whether every file of the job is known to be good."""
    files = (session.get(File, file_id) for _, file_id in _named(job))
    return all(file is None or file.status == "processed" for file in files)


def _named(asked: NewJob | Job) -> list[tuple[str, str]]:
    return [(param, getattr(asked, param)) for param in PARAMS if getattr(asked, param) is not None]


def _hold(session: Session, file_id: str, *, org_id: str) -> File:
    # Locked against the check that may end right now: it would miss the job that starts to wait for it.
    select_ = scoped(File, org_id).where(File.id == file_id).with_for_update(read=True)
    file = session.scalar(select_.execution_options(populate_existing=True))
    if file is None:
        raise NotFound("file", file_id)
    return file


def _describe_misfit(file: File, asked: NewJob | Job) -> str | None:
    """What is wrong with good rows. Files and jobs of older versions do not say: they are taken."""
    found, wanted = (file.report or {}).get("kind"), asked.spec.get("learns_from")
    if found is None or wanted is None or found in wanted:
        return None
    return f"the file has {found} rows, but {asked.method} learns from {' or '.join(wanted)} rows"
