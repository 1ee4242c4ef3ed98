"""Bytes of a request on their way to the disk: the next ones arrive while the last ones are written."""

import asyncio
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from starlette.requests import Request

from api.middleware import allow_body
from db.blobs import BlobWriter

# A hundred uploads at once hold two of these each.
LOAD_BYTES = 256 * 1024
# Beside those that serve all other requests: uploads that wait for the disk keep nobody else waiting.
_THREADS = 4
BINARY = {"type": "string", "format": "binary"}
_limiter: RunVar[CapacityLimiter] = RunVar("disk threads")
P = ParamSpec("P")
T = TypeVar("T")


async def on_disk(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do `work` in one of the few threads that are for the bytes of uploads."""
    limiter = _limiter.get(None)
    if limiter is None:
        limiter = CapacityLimiter(_THREADS)
        _limiter.set(limiter)
    return await to_thread.run_sync(partial(work, *args, **kwargs), limiter=limiter)


def describe_body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    """What the API's description says of a body that a route reads as it comes."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def describe_form(file_field: str, *required: str, **fields: dict[str, Any]) -> dict[str, Any]:
    """The same of a form with one file."""
    properties = {file_field: BINARY, **fields}
    schema = {"type": "object", "required": [file_field, *required], "properties": properties}
    return describe_body("multipart/form-data", schema)


class Intake:
    """Hands loads of bytes to a writer in a thread, one at a time; waits for the last at its end."""

    def __init__(self, writer: BlobWriter) -> None:
        self._writer = writer
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Intake":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is None:
            return
        await asyncio.wait({self._writing})  # whatever happened: the writer is about to be closed
        if error is None:
            self._writing.result()

    async def write(self, load: bytes) -> None:
        """Begin to write `load` as soon as the one before is written. Raises OSError for that one."""
        if self._writing is not None:
            await asyncio.wait({self._writing})
            self._writing.result()
        self._writing = asyncio.create_task(on_disk(self._writer.write, load))


async def read_raw(request: Request, writer: BlobWriter, *, limit_bytes: int) -> None:
    """Read the body of `request` into `writer`. Raises ApiError (413), ClientDisconnect, OSError."""
    allow_body(request, limit_bytes=limit_bytes)
    chunks: list[bytes] = []
    waiting_bytes = 0
    async with Intake(writer) as intake:
        async for chunk in request.stream():
            chunks.append(chunk)
            waiting_bytes += len(chunk)
            if waiting_bytes >= LOAD_BYTES:
                await intake.write(b"".join(chunks))
                chunks.clear()
                waiting_bytes = 0
        await intake.write(b"".join(chunks))
