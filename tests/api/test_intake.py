"""Bytes on their way in: what one upload holds of them, and what many do together."""

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest

from api.intake import LOAD_BYTES, Intake, load_bytes
from db.blobs import BlobWriter

TOGETHER_BYTES = 32 << 20


@pytest.mark.parametrize("n_uploads", [1, 16, 17, 100, 256])
def test_together_uploads_hold_no_more_than_their_share(n_uploads):
    assert 2 * n_uploads * load_bytes(n_uploads) <= TOGETHER_BYTES
    assert load_bytes(1) == LOAD_BYTES


async def collect(writer: BlobWriter, n_bytes: int) -> int:
    """How many of twice so many bytes are written while more may come."""
    async with Intake(writer) as intake:
        await intake.add(b"x" * n_bytes)
        await intake.add(b"x" * n_bytes)  # if it is a load of its own, it waits for the one before
        before = writer.size_bytes
    assert writer.size_bytes == 2 * n_bytes
    return before


async def crowd(root: Path, *, n_uploads: int, n_bytes: int) -> list[int]:
    """The bytes that each of many uploads at once writes before it ends; all but the first break off."""
    with ExitStack() as stack:
        writers = [stack.enter_context(BlobWriter(root, "org")) for _ in range(n_uploads)]
        intakes = [Intake(writer) for writer in writers]
        for intake in intakes:
            await intake.__aenter__()
        for intake in intakes:
            await intake.add(b"x" * n_bytes)
        await intakes[0].__aexit__(None, None, None)
        gone = ConnectionError("the client is gone")
        for intake in intakes[1:]:
            await intake.__aexit__(ConnectionError, gone, None)
        return [writer.size_bytes for writer in writers]


def test_many_write_sooner_than_one_and_leave_nothing_of_it(tmp_path):
    n_bytes = LOAD_BYTES // 4

    async def live() -> tuple[list[int], int]:
        written = await crowd(tmp_path, n_uploads=100, n_bytes=n_bytes)
        with BlobWriter(tmp_path, "org") as writer:
            return written, await collect(writer, n_bytes)

    written, alone = asyncio.run(live())
    assert set(written) == {n_bytes}  # each had more than its share
    assert alone == 0  # it is alone again, and half a load waits for the rest
