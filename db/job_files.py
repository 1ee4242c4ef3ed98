"""The files that a job reads: whether it may, and whether they hold what its method learns from."""

from typing import Any

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from db.errors import Conflict, NotFound
from db.models import File, Job, MixedFile
from db.new_jobs import NewJob
from db.scope import scoped


def hold(session: Session, asked: NewJob | Job, *, org_id: str) -> dict[str, File]:
    """The files of a job by their parameter, kept from changing until the commit.

    Raises `NotFound` for an unknown file and `Conflict` for one that the job cannot use.
    """
    held = {param: _hold(session, file_id, org_id=org_id) for param, file_id in list_named(asked)}
    for param, file in held.items():
        if file.purpose != "fine-tune":
            message = f"File '{file.id}' has the purpose '{file.purpose}'."
            raise Conflict("invalid_file_purpose", message, param=param)
        if file.status == "error":
            message = f"File '{file.id}' is invalid: {file.status_details}"
            raise Conflict(_code_of(param), message, param=param)
        misfit = _describe_misfit(file, asked)
        if misfit is not None:
            raise Conflict(_code_of(param), misfit, param=param)
    return held


def hold_all(session: Session, job_ids: list[str]) -> None:
    """Keep the files of several jobs from changing until the commit."""
    jobs = session.scalars(select(Job).where(Job.id.in_(job_ids)))
    file_ids = {file_id for job in jobs for _, file_id in list_named(job)}
    held = select(File).where(File.id.in_(file_ids)).order_by(File.id).with_for_update(read=True)
    session.scalars(held.execution_options(populate_existing=True)).all()


def find_error(session: Session, job: Job) -> dict[str, Any] | None:
    """Why the job cannot run on its files, as far as they are checked: {code, message, param}."""
    for param, file_id in list_named(job):
        file = session.get(File, file_id)
        if file is None:
            continue
        message = file.status_details if file.status == "error" else _describe_misfit(file, job)
        if message is not None or file.status == "error":
            return {"code": _code_of(param), "message": message, "param": param}
    return None


def all_checked(session: Session, job: Job) -> bool:
    """Whether every file of the job is known to be good."""
    files = (session.get(File, file_id) for _, file_id in list_named(job))
    return all(file is None or file.status == "processed" for file in files)


def reads(file_id: str) -> ColumnElement[bool]:
    """The condition that a job reads a file."""
    mixing = select(MixedFile.job_id).where(MixedFile.file_id == file_id)
    return or_(Job.training_file == file_id, Job.validation_file == file_id, Job.id.in_(mixing))


def note_mixed(session: Session, job: Job) -> None:
    """Note the files of a new job that trains on several."""
    for part in mixture_of(job):
        session.add(MixedFile(job_id=job.id, file_id=part["file"], org_id=job.org_id))
    session.flush()


def mixture_of(asked: NewJob | Job) -> list[dict[str, Any]]:
    """The files of a job that trains on several: {"file": id} with its "weight" or "epochs"; else nothing."""
    return asked.spec.get("training_files") or []


def param_of(asked: NewJob | Job, file_id: str) -> str | None:
    """Where a job names a file."""
    return next((param for param, named in list_named(asked) if named == file_id), None)


def list_named(asked: NewJob | Job) -> list[tuple[str, str]]:
    """The files of a job, each with the parameter that names it."""
    mixed = [(f"training_files.{i}.file", part["file"]) for i, part in enumerate(mixture_of(asked))]
    named = mixed or [("training_file", asked.training_file)]
    return [*named, ("validation_file", asked.validation_file)] if asked.validation_file else named


def _code_of(param: str) -> str:
    return "invalid_validation_file" if param == "validation_file" else "invalid_training_file"


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
