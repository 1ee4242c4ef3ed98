"""Bytes of a request on their way to the disk: the next ones arrive while the last ones are written."""

import asyncio
from types import TracebackType

from fastapi.concurrency import run_in_threadpool
from starlette.requests import Request

from api.middleware import allow_body
from db.blobs import BlobWriter

# A hundred uploads at once hold two of these each.
LOAD_BYTES = 512 * 1024


class Intake:
    """Hands loads of bytes to a writer in the thread pool, one at a time; waits for the last at its end."""

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
        self._writing = asyncio.create_task(run_in_threadpool(self._writer.write, load))


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
