"""/v1/fine_tuning/jobs/{id}/…: what a job did: events, checkpoints, log."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from api import render
from api.auth import CallerDep
from api.deps import After, DatabaseDep, Limit, SettingsDep
from api.run_files import newest_attempt, read_log_piece
from api.schemas.jobs import CheckpointList, EventList
from db import checkpoints, events, jobs

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}", tags=["Fine-tuning"])


@router.get("/events", summary="List fine-tuning events")
def list_events(
    job_id: str,
    caller: CallerDep,
    database: DatabaseDep,
    after: After = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "desc",
    type: Annotated[
        Literal["message", "metrics"] | None, Query(description="Only events of this type.")
    ] = None,
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
            type_=type,
        )
    return EventList(data=[render.event_object(event) for event in page.rows], has_more=page.has_more)


@router.get("/checkpoints", summary="List fine-tuning checkpoints")
def list_checkpoints(
    job_id: str, caller: CallerDep, database: DatabaseDep, after: After = None, limit: Limit = 10
) -> CheckpointList:
    """The saved states of a job, newest first."""
    with database.read() as session:
        job = jobs.get(session, job_id, org_id=caller.org_id)
        page = checkpoints.list_page(session, org_id=caller.org_id, job_id=job.id, after=after, limit=limit)
    objects = [render.checkpoint_object(row) for row in page.rows]
    return CheckpointList.model_validate(render.page(objects, has_more=page.has_more))


@router.get(
    "/logs",
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
    number = attempt or newest_attempt(settings.runs_dir / job.id)
    text = read_log_piece(settings.runs_dir / job.id / str(number), offset_bytes=offset)
    headers = {"x-next-offset": str(offset + len(text)), "x-attempt": str(number)}
    return Response(text, media_type="text/plain", headers=headers)
