"""The stored bytes of a file as an answer, which is never whole where they are not as they were stored."""

import base64
import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from fastapi import Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from api import digests
from db import blobs
from db.errors import Corrupt

_BASE64_CHUNK_BYTES = 3 * 256 * 1024  # of whole threes, so that no padding comes in the middle


def answer(path: Path, *, sha256: str, filename: str, is_range: bool) -> Response:
    """The bytes, or the range that is asked for. Raises Corrupt."""
    if is_range:  # only the whole has a digest
        for _ in blobs.read_as_stored(path, sha256=sha256):
            pass
    whole = FileResponse if is_range else _AsStored
    headers = {digests.HEADER: digests.write(sha256)}
    return whole(path, media_type="application/octet-stream", filename=filename, headers=headers)


def answer_base64(path: Path, *, sha256: str) -> Response:
    """The bytes as text. Raises Corrupt."""
    chunks = blobs.read_as_stored(path, sha256=sha256, chunk_bytes=_BASE64_CHUNK_BYTES)
    return StreamingResponse(_encode(chain([next(chunks)], chunks)), media_type="text/plain")


def _encode(chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        yield base64.b64encode(chunk)


class _AsStored(FileResponse):
    """A whole blob. The last bytes are sent only if all have its digest, which is the file's name: otherwise
    the connection breaks off, or, where nothing was sent yet, Corrupt is raised.
    """

    chunk_size = 256 * 1024

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the blob."""
        sha256 = Path(self.path).name
        digest = hashlib.sha256()
        held: list[Message] = []

        async def send_as_stored(message: Message) -> None:
            digest.update(message.get("body", b""))
            held.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                if digest.hexdigest() != sha256:
                    raise Corrupt(blobs.describe_change(sha256))
                while held:
                    await send(held.pop(0))
            while len(held) > 2:  # the beginning and the first bytes wait for each other
                await send(held.pop(0))

        await super().__call__(scope, receive, send_as_stored)
