"""/v1/fine_tuning/jobs: training."""

import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Query, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from api import render, single_job
from api.auth import CallerDep
from api.deps import METADATA_FILTER, After, DatabaseDep, Limit, SettingsDep
from api.disconnect import unless_disconnected
from api.errors import ApiError
from api.methods import kinds_taken
from api.once import OnceDep
from api.schemas.jobs import CreateJob, JobList, JobObject, JobStatus, Training
from api.watch import WatchDep
from db import events, job_files, job_queries, jobs
from db.errors import NotFound
from db.new_jobs import NewJob
from db.states import JOB_TERMINAL
from trainers.specs import SPEC_VERSION, Method, Resources, SpecError, check_shares, parse_method, resolve
from trainers.specs.resolution import check_split
from workers.dispatch import ring

router = APIRouter(prefix="/fine_tuning/jobs", tags=["Fine-tuning"])


@router.post("", summary="Create fine-tuning job")
def create_job(
    body: CreateJob, caller: CallerDep, once: OnceDep, settings: SettingsDep, background: BackgroundTasks
) -> JobObject:
    """Start a job. It waits for its files to be checked, then for a free device."""
    new = _new_job(body)

    def make(session: Session) -> dict[str, Any]:
        try:
            job = jobs.create(session, new, org_id=caller.org_id)
        except NotFound as error:
            raise _with_param(error, new) from error
        background.add_task(ring, "train")
        background.add_task(ring, "cpu")
        return single_job.show(session, job, settings=settings).model_dump(mode="json")

    asked = body.model_dump(mode="json", exclude_unset=True)
    return JobObject.model_validate(once.answer(make, request=("POST /v1/fine_tuning/jobs", asked)))


def _new_job(body: CreateJob) -> NewJob:
    method = parse_method(body.method, body.hyperparameters)
    chosen = seed_of(body, method)
    seed = secrets.randbelow(2**31) if chosen is None else chosen
    integrations = [item.model_dump(mode="json") for item in body.integrations or []]
    return describe_job(body, method, model=body.model, seed=seed, integrations=integrations or None)


def describe_job(
    asked: Training, method: Method, *, model: str, seed: int, integrations: list[Any] | None = None
) -> NewJob:
    """What is asked for as a job to be made. Raises SpecError for numbers that cannot be combined."""
    resources = _resources_of(asked, method)
    has_validation_file = asked.validation_file is not None
    check_split(method.hyperparameters, has_validation_file=has_validation_file, method=method.type)
    # Refused now; the worker resolves again when it knows the rows.
    resolve(method, n_examples=1, seed=seed, nproc_per_node=resources.processes)
    first, mixture = _read_training_files(asked)
    return NewJob(
        model=model,
        training_file=first,
        validation_file=asked.validation_file,
        method=method.type,
        spec_version=SPEC_VERSION,
        spec={
            "method": method.to_request(),
            "ignored": method.ignored,
            "learns_from": kinds_taken(method.kind),
            **({"training_files": mixture} if mixture else {}),
        },
        resources=resources.model_dump(mode="json"),
        seed=seed,
        suffix=asked.suffix,
        metadata=dict(asked.metadata) if asked.metadata is not None else None,
        integrations=integrations,
        priority=asked.priority,
        on_oom=asked.on_oom,
    )


def _read_training_files(asked: Training) -> tuple[str, list[dict[str, Any]]]:
    """(the first file, all of them with their shares if they are several)."""
    mixed = asked.training_files
    if mixed is None:
        if asked.training_file is None:
            message = "Missing required parameter: 'training_file'."
            raise SpecError(message, param="training_file", code="missing_required_parameter")
        return asked.training_file, []
    if asked.training_file not in (None, mixed[0].file):
        raise SpecError("training_file is not the first of training_files", param="training_file")
    check_shares([part.share for part in mixed])
    ids = [part.file for part in mixed]
    for i, file_id in enumerate(ids):
        if file_id in ids[:i]:
            message = f"'{file_id}' is given twice; its weight or its epochs say how much of it is taken"
            raise SpecError(message, param=f"training_files.{i}.file")
    if len(mixed) == 1 and mixed[0].share.epochs is None:
        return ids[0], []  # a weight beside nothing
    return ids[0], [part.model_dump(mode="json", exclude_none=True) for part in mixed]


def seed_of(asked: Training, method: Method) -> int | None:
    """The seed, whether it stands in the job or, as with the reference, among the hyperparameters."""
    inner = method.job_fields.seed
    if None not in (asked.seed, inner) and asked.seed != inner:
        raise SpecError("the job has another seed than its hyperparameters", param="seed")
    return inner if asked.seed is None else asked.seed


def _resources_of(asked: Training, method: Method) -> Resources:
    inner = method.job_fields.nproc_per_node
    if inner is None:
        return asked.resources or Resources()
    if asked.resources and asked.resources.nproc_per_node != inner:
        raise SpecError(
            "the job has another nproc_per_node than its hyperparameters", param="resources.nproc_per_node"
        )
    return asked.resources or Resources(nproc_per_node=inner)


def _with_param(error: NotFound, new: NewJob) -> Exception:
    if error.kind != "file":
        return error
    return ApiError(404, "not_found", str(error), param=job_files.param_of(new, error.subject_id))


@router.get("", summary="List fine-tuning jobs")
def list_jobs(
    request: Request,
    caller: CallerDep,
    database: DatabaseDep,
    after: After = None,
    limit: Limit = 20,
    status: Annotated[JobStatus | None, Query(description="Only jobs with this status.")] = None,
    method: Annotated[str | None, Query(description="Only jobs with this method type.")] = None,
    metadata: Annotated[
        Literal["null"] | None,
        Query(description="`null`: only jobs without metadata. `metadata[key]=value`: only those with it."),
    ] = None,
) -> JobList:
    """Your jobs, newest first."""
    pairs = {
        found[1]: value
        for name, value in request.query_params.items()
        if (found := METADATA_FILTER.fullmatch(name))
    }
    with database.read() as session:
        page = job_queries.list_page(
            session,
            org_id=caller.org_id,
            after=after,
            limit=limit,
            status=status,
            method=method,
            metadata=pairs,
            without_metadata=metadata is not None,
        )
    return JobList(data=[render.job_object(job) for job in page.rows], has_more=page.has_more)


@router.get("/{job_id}", summary="Retrieve fine-tuning job")
async def retrieve_job(
    job_id: str,
    request: Request,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    watch: WatchDep,
    wait: Annotated[
        float, Query(ge=0, le=60, description="Seconds to wait for another status, if the job is not over.")
    ] = 0.0,
) -> JobObject:
    """A job and how far it is."""

    def look() -> tuple[JobObject, int]:
        with database.read() as session:
            # Read before the job: a change in between is waited for as news, rather than missed.
            seq = events.latest(session, {job_id}).get(job_id, 0)
            job = jobs.get(session, job_id, org_id=caller.org_id)
            return single_job.show(session, job, settings=settings), seq

    found, seq = await run_in_threadpool(look)
    before, give_up_at, going_on = found.status, time.monotonic() + wait, wait > 0
    while going_on and found.status == before and before not in JOB_TERMINAL:
        left_s = give_up_at - time.monotonic()
        going_on = await unless_disconnected(request, watch.news(job_id, after_seq=seq, timeout_s=left_s))
        found, seq = await run_in_threadpool(look)
    return found


@router.post("/{job_id}/cancel", summary="Cancel fine-tuning job")
def cancel_job(job_id: str, caller: CallerDep, database: DatabaseDep) -> JobObject:
    """Cancel a job. One that runs keeps its status until its worker has stopped."""
    with database.write() as session:
        job = jobs.request_cancel(session, job_id, org_id=caller.org_id)
        return render.job_object(job)


@router.post("/{job_id}/pause", summary="Pause fine-tuning job")
def pause_job(job_id: str, caller: CallerDep, database: DatabaseDep) -> JobObject:
    """Pause a job. One that runs keeps its status until its worker has saved a checkpoint and stopped."""
    with database.write() as session:
        job = jobs.request_pause(session, job_id, org_id=caller.org_id)
        return render.job_object(job)


@router.post("/{job_id}/resume", summary="Resume fine-tuning job")
def resume_job(
    job_id: str,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    background: BackgroundTasks,
) -> JobObject:
    """Queue a paused job again. It goes on from its last checkpoint."""
    with database.write() as session:
        job = jobs.resume(session, job_id, org_id=caller.org_id)
        found = single_job.show(session, job, settings=settings)
    background.add_task(ring, "train")
    return found
