"""/v1/fine_tuning/jobs/{id}/logs/stream: what the trainers of a job print, as they print it."""

import json
import logging
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import StreamingResponse

from api import event_stream
from api.auth import CallerDep
from api.deps import DatabaseDep, SettingsDep
from api.errors import ApiError
from api.run_files import newest_attempt, read_log_piece
from api.watch import Watch, WatchDep
from db import events, jobs
from db.session import Database
from db.states import JOB_TERMINAL

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}", tags=["Fine-tuning"])
logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5  # a line of the log leaves no event
_PLACE = re.compile(r"(\d{1,9}):(\d{1,15})")


@dataclass(frozen=True)
class _Place:
    """Up to where the log was read: bytes of an attempt's. Written `attempt:bytes`."""

    attempt: int
    offset_bytes: int

    def __str__(self) -> str:
        return f"{self.attempt}:{self.offset_bytes}"


@router.get(
    "/logs/stream",
    summary="Stream fine-tuning log",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Some lines a frame."}},
)
async def stream_log(
    job_id: str,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    watch: WatchDep,
    last_event_id: Annotated[
        str | None, Header(description="Id of the last frame that was received.")
    ] = None,
) -> Response:
    """What the trainers print, attempt after attempt, as server-sent events: `{"attempt", "text"}`.

    `[DONE]` once the job is over. A stream that ends without it was cut short: ask again with the last id.
    """
    place = _read_place(last_event_id)
    tail = _Tail(database, org_id=caller.org_id, job_id=job_id, job_dir=settings.runs_dir / job_id)
    seq, is_over = await run_in_threadpool(tail.look)  # a job that is not there is told before the stream
    frames = _frames(tail, place, watch, seq=seq, is_over=is_over)
    return StreamingResponse(frames, media_type="text/event-stream", headers=event_stream.HEADERS)


def _read_place(last_event_id: str | None) -> _Place:
    if last_event_id is None:
        return _Place(attempt=1, offset_bytes=0)
    found = _PLACE.fullmatch(last_event_id)
    if found is None:
        message = "This is not the id of a frame of this stream."
        raise ApiError(400, "invalid_value", message, param="Last-Event-ID")
    return _Place(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class _Tail:
    """Reads the log of a job, and how the job stands."""

    database: Database
    org_id: str
    job_id: str
    job_dir: Path

    def look(self) -> tuple[int, bool]:
        """The number of the job's newest event, and whether it is over. Raises `NotFound`."""
        with self.database.read() as session:
            job = jobs.get(session, self.job_id, org_id=self.org_id)
            return events.latest(session, {job.id}).get(job.id, 0), job.status in JOB_TERMINAL

    def read(self, place: _Place) -> tuple[str, _Place]:
        """What follows `place`, in this attempt's log or in a later one's; no text when there is nothing."""
        newest = newest_attempt(self.job_dir)
        for attempt in range(place.attempt, newest + 1):
            start = place.offset_bytes if attempt == place.attempt else 0
            found = read_log_piece(self.job_dir / str(attempt), offset_bytes=start)
            if found:
                return found.decode(errors="replace"), _Place(attempt, start + len(found))
        return "", place


async def _frames(tail: _Tail, place: _Place, watch: Watch, *, seq: int, is_over: bool) -> AsyncIterator[str]:
    told_at = time.monotonic()
    while not watch.closed:
        text, place = await run_in_threadpool(tail.read, place)
        if text:
            yield f"id: {place}\ndata: {json.dumps({'attempt': place.attempt, 'text': text})}\n\n"
            told_at = time.monotonic()
            continue
        if is_over:  # which was known before the log was read to its end
            yield "data: [DONE]\n\n"
            return
        if time.monotonic() - told_at >= event_stream.PING_S:
            yield ": ping\n\n"
            told_at = time.monotonic()
        if await watch.news(tail.job_id, after_seq=seq, timeout_s=_LOOK_EVERY_S):
            try:
                seq, is_over = await run_in_threadpool(tail.look)
            except SQLAlchemyError as error:
                logger.warning("the log stream of %s ends early: %s", tail.job_id, error)
                return
