"""/v1/fine_tuning/jobs/{id}/events/stream: what happens to a job, as it happens."""

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Header, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import StreamingResponse

from api import render
from api.auth import CallerDep
from api.deps import After, DatabaseDep
from api.schemas.jobs import EventObject
from api.watch import Watch, WatchDep
from db import events, jobs
from db.errors import Conflict
from db.session import Database
from db.states import JOB_TERMINAL

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}", tags=["Fine-tuning"])
logger = logging.getLogger(__name__)

PING_S = 15.0
HEADERS = {"x-accel-buffering": "no", "cache-control": "no-cache"}  # a proxy that buffers makes it one lump
_BATCH_EVENTS = 100


@router.get(
    "/events/stream",
    summary="Stream fine-tuning events",
    response_class=Response,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "One event a frame, oldest first."}
    },
)
async def stream_events(
    job_id: str,
    caller: CallerDep,
    database: DatabaseDep,
    watch: WatchDep,
    after: After = None,
    last_event_id: Annotated[
        str | None, Header(description="Id of the last event that was received; goes before `after`.")
    ] = None,
) -> Response:
    """What happened to a job and what happens, as server-sent events; `[DONE]` once the job is over.

    A stream that ends without `[DONE]` was cut short: ask again with the id of the last event.
    """
    feed = _Feed(database, org_id=caller.org_id, job_id=job_id)
    try:
        batch = await run_in_threadpool(feed.read, last_event_id or after)
    except Conflict as error:
        param = "Last-Event-ID" if last_event_id else "after"
        raise Conflict(error.code, str(error), param=param) from error
    return StreamingResponse(_frames(feed, batch, watch), media_type="text/event-stream", headers=HEADERS)


@dataclass(frozen=True)
class _Batch:
    events: list[EventObject]
    last_id: str | None
    seq: int  # all events up to here are in this batch or in those before
    has_more: bool
    is_over: bool


@dataclass(frozen=True)
class _Feed:
    """Reads the events of a job, a batch a session."""

    database: Database
    org_id: str
    job_id: str

    def read(self, after: str | None) -> _Batch:
        """The events that follow `after`, oldest first. Raises `NotFound`, `Conflict`."""
        with self.database.read() as session:
            # In this order: an event that comes in between may be read twice as news, but is never missed,
            # and all events of a job that is over are there.
            newest = events.latest(session, {self.job_id}).get(self.job_id, 0)
            job = jobs.get(session, self.job_id, org_id=self.org_id)
            page = events.list_page(
                session,
                org_id=self.org_id,
                job_id=job.id,
                after=after,
                limit=_BATCH_EVENTS,
                descending=False,
            )
        return _Batch(
            events=[render.event_object(event) for event in page.rows],
            last_id=page.rows[-1].id if page.rows else after,
            seq=page.rows[-1].seq if page.rows else newest,
            has_more=page.has_more,
            is_over=job.status in JOB_TERMINAL,
        )


async def _frames(feed: _Feed, batch: _Batch, watch: Watch) -> AsyncIterator[str]:
    while True:
        for event in batch.events:
            # ASCII JSON: some clients take U+2028 and the like for ends of lines.
            yield f"id: {event.id}\ndata: {json.dumps(event.model_dump(mode='json'))}\n\n"
        if batch.is_over and not batch.has_more:
            yield "data: [DONE]\n\n"
            return
        while (
            not batch.has_more
            and not await watch.news(feed.job_id, after_seq=batch.seq, timeout_s=PING_S)
            and not watch.closed
        ):
            yield ": ping\n\n"
        if watch.closed:
            return
        try:
            batch = await run_in_threadpool(feed.read, batch.last_id)
        except SQLAlchemyError as error:
            logger.warning("a stream of %s ends early: %s", feed.job_id, error)
            return
