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

LOAD_BYTES = 1 << 20  # of an upload that is alone; every load costs some changes of threads
# Each upload holds two loads, one that comes and one that is written; of many at once, smaller ones, so that
# about as much is held by all together, up to 256 of them.
_ALL_LOADS_BYTES = 32 << 20
_LEAST_LOAD_BYTES = 64 << 10
# Beside those that serve all other requests: uploads that wait for the disk keep nobody else waiting.
_THREADS = 4
BINARY = {"type": "string", "format": "binary"}
_limiter: RunVar[CapacityLimiter] = RunVar("disk threads")
_n_intakes: RunVar[int] = RunVar("uploads that come in", 0)
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
    """Collects bytes and hands them to a writer in a thread, a load at a time; at its end, what is left.

    Entering and leaving count the uploads of this process, among which the memory for loads is shared.
    """

    def __init__(self, writer: BlobWriter) -> None:
        self._writer = writer
        self._writing: asyncio.Task[None] | None = None
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0

    async def __aenter__(self) -> "Intake":
        _n_intakes.set(_n_intakes.get() + 1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self._write()
        finally:
            _n_intakes.set(_n_intakes.get() - 1)
            if self._writing is not None:
                await asyncio.wait({self._writing})  # whatever happened: the writer is about to be closed
        if error is None and self._writing is not None:
            self._writing.result()

    async def add(self, *pieces: bytes) -> None:
        """Take bytes; begin to write a load when it is full. Raises OSError for the load before."""
        self._pieces += pieces
        self._waiting_bytes += sum(map(len, pieces))
        if self._waiting_bytes >= load_bytes(_n_intakes.get()):
            await self._write()

    async def _write(self) -> None:
        """Begin to write as soon as the load before is written."""
        if self._writing is not None:
            await asyncio.wait({self._writing})
            self._writing.result()
        load = b"".join(self._pieces)
        self._pieces.clear()
        self._waiting_bytes = 0
        self._writing = asyncio.create_task(on_disk(self._writer.write, load))


def load_bytes(n_intakes: int) -> int:
    """How much each of so many uploads collects before it is written."""
    return max(_LEAST_LOAD_BYTES, min(LOAD_BYTES, _ALL_LOADS_BYTES // (2 * n_intakes)))


async def read_raw(request: Request, writer: BlobWriter, *, limit_bytes: int) -> None:
    """Read the body of `request` into `writer`. Raises ApiError (413), ClientDisconnect, OSError."""
    allow_body(request, limit_bytes=limit_bytes)
    async with Intake(writer) as intake:
        async for chunk in request.stream():
            await intake.add(chunk)
