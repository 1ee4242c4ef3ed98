"""/v1/fine_tuning/jobs: training."""

import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Query, Request, Response
from sqlalchemy.orm import Session

from api import render
from api.auth import CallerDep
from api.deps import After, DatabaseDep, IdempotencyKey, SettingsDep, answer_once
from api.errors import ApiError
from api.schemas import CheckpointList, CreateJob, EventList, JobList, JobObject, JobStatus
from db import checkpoints, events, jobs
from db.errors import NotFound
from db.jobs import NewJob
from trainers.specs import SPEC_VERSION, Resources, parse_method, resolve
from workers.dispatch import ring

router = APIRouter(prefix="/fine_tuning/jobs", tags=["Fine-tuning"])

_LOG_MAX_BYTES = 1024 * 1024
Limit = Annotated[int, Query(ge=1, le=1000, description="Objects of a page.")]


@router.post("", summary="Create fine-tuning job")
def create_job(
    body: CreateJob,
    caller: CallerDep,
    database: DatabaseDep,
    background: BackgroundTasks,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobObject:
    """Start a job. It waits for its files to be checked, then for a free device."""
    new = _new_job(body)

    def make(session: Session) -> dict[str, Any]:
        try:
            job = jobs.create(session, new, org_id=caller.org_id)
        except NotFound as error:
            raise _with_param(error, new) from error
        position = jobs.queue_position(session, job.id)
        return render.job_object(job, queue_position=position).model_dump(mode="json")

    answer, replayed = answer_once(
        database,
        make,
        org_id=caller.org_id,
        key=idempotency_key,
        request=("POST /v1/fine_tuning/jobs", body.model_dump(mode="json", exclude_unset=True)),
    )
    if replayed:
        response.headers["idempotency-replayed"] = "true"
    else:
        background.add_task(ring, "train")
        background.add_task(ring, "cpu")
    return JobObject.model_validate(answer)


def _new_job(body: CreateJob) -> NewJob:
    method = parse_method(body.method, body.hyperparameters)
    resources = body.resources or Resources()
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    # Numbers that cannot be combined are refused now; the worker resolves again when it knows the rows.
    resolve(method, n_examples=1, seed=seed, nproc_per_node=resources.nproc_per_node)
    return NewJob(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        method=method.type,
        spec_version=SPEC_VERSION,
        spec={"method": method.model_dump(mode="json")},
        resources=resources.model_dump(mode="json"),
        seed=seed,
        suffix=body.suffix,
        metadata=dict(body.metadata) if body.metadata is not None else None,
        integrations=[item.model_dump(mode="json") for item in body.integrations or []] or None,
    )


def _with_param(error: NotFound, new: NewJob) -> Exception:
    if error.kind != "file":
        return error
    param = "training_file" if error.subject_id == new.training_file else "validation_file"
    return ApiError(404, "not_found", str(error), param=param)


@router.get("", summary="List fine-tuning jobs")
def list_jobs(
    request: Request,
    caller: CallerDep,
    database: DatabaseDep,
    after: After = None,
    limit: Limit = 20,
    status: Annotated[JobStatus | None, Query(description="Only jobs with this status.")] = None,
) -> JobList:
    """Your jobs, newest first."""
    for name in request.query_params:
        if name.startswith("metadata"):  # to ignore a filter is to answer another question
            raise ApiError(400, "unsupported_parameter", "Jobs cannot be filtered by metadata.", param=name)
    with database.read() as session:
        page = jobs.list_page(session, org_id=caller.org_id, status=status, after=after, limit=limit)
    return JobList(data=[render.job_object(job) for job in page.rows], has_more=page.has_more)


@router.get("/{job_id}", summary="Retrieve fine-tuning job")
def retrieve_job(job_id: str, caller: CallerDep, database: DatabaseDep) -> JobObject:
    """A job and how far it is."""
    with database.read() as session:
        job = jobs.get(session, job_id, org_id=caller.org_id)
        return render.job_object(job, queue_position=jobs.queue_position(session, job.id))


@router.post("/{job_id}/cancel", summary="Cancel fine-tuning job")
def cancel_job(job_id: str, caller: CallerDep, database: DatabaseDep) -> JobObject:
    """Cancel a job. One that runs keeps its status until its worker has stopped."""
    with database.write() as session:
        job = jobs.request_cancel(session, job_id, org_id=caller.org_id)
        return render.job_object(job)


@router.get("/{job_id}/events", summary="List fine-tuning events")
def list_events(
    job_id: str,
    caller: CallerDep,
    database: DatabaseDep,
    after: After = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "desc",
) -> EventList:
    """What happened to a job, newest first."""
    with database.read() as session:
        job = jobs.get(session, job_id, org_id=caller.org_id)
        page = events.list_page(
            session,
            org_id=caller.org_id,
            job_id=job.id,
            after=after,
            limit=limit,
            descending=order == "desc",
        )
    return EventList(data=[render.event_object(event) for event in page.rows], has_more=page.has_more)


@router.get("/{job_id}/checkpoints", summary="List fine-tuning checkpoints")
def list_checkpoints(
    job_id: str, caller: CallerDep, database: DatabaseDep, after: After = None, limit: Limit = 10
) -> CheckpointList:
    """The saved states of a job, newest first."""
    with database.read() as session:
        job = jobs.get(session, job_id, org_id=caller.org_id)
        page = checkpoints.list_page(session, org_id=caller.org_id, job_id=job.id, after=after, limit=limit)
    objects = [render.checkpoint_object(row, job, org_name=caller.org_name) for row in page.rows]
    return CheckpointList.model_validate(render.page(objects, has_more=page.has_more))


@router.get(
    "/{job_id}/logs",
    summary="Read fine-tuning log",
    response_class=Response,
    responses={
        200: {
            "content": {"text/plain": {}},
            "description": "Text of the log.",
            "headers": {
                "x-next-offset": {"schema": {"type": "integer"}, "description": "Ask from here next."},
                "x-attempt": {"schema": {"type": "integer"}, "description": "The attempt that wrote it."},
            },
        }
    },
)
def read_log(
    job_id: str,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    offset: Annotated[int, Query(ge=0, le=2**50, description="Byte to start from.")] = 0,
    attempt: Annotated[int | None, Query(ge=1, le=2**31, description="The newest when absent.")] = None,
) -> Response:
    """What the trainer printed, at most 1 MiB an answer. Empty while there is nothing new."""
    with database.read() as session:
        job = jobs.get(session, job_id, org_id=caller.org_id)
    number = attempt or _newest_attempt(settings.runs_dir / job.id)
    text = _read_log(settings.runs_dir / job.id / str(number) / "log.txt", offset_bytes=offset)
    headers = {"x-next-offset": str(offset + len(text)), "x-attempt": str(number)}
    return Response(text, media_type="text/plain", headers=headers)


def _newest_attempt(job_dir: Path) -> int:
    if not job_dir.is_dir():
        return 0
    return max((int(entry.name) for entry in job_dir.iterdir() if entry.name.isdecimal()), default=0)


def _read_log(path: Path, *, offset_bytes: int) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as log:
        log.seek(offset_bytes)
        text = log.read(_LOG_MAX_BYTES)
    return _whole_characters(text)


def _whole_characters(text: bytes) -> bytes:
    """`text` without a UTF-8 character that is cut off at its end."""
    for size in range(1, min(3, len(text)) + 1):
        byte = text[-size]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
            needed = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return text[:-size] if needed > size else text
        if byte < 0x80:
            return text
    return text
