"""Uploads in parts under races: one file, no bytes without a row, none left of what has ended."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db import upkeep, uploads
from db.blobs import BlobWriter
from db.errors import Conflict, Corrupt, NotFound
from db.models import File, Upload, UploadPart
from db.session import Database
from db.settings import DatabaseSettings
from tests.db.world import World, race, run_against_open, run_against_paused

HALVES = (b"first half, ", b"second half")
TOTAL_BYTES = sum(map(len, HALVES))


def begin(world: World) -> str:
    with world.database.write() as session:
        return uploads.create(
            session, org_id=world.org_id, filename="a.jsonl", purpose="fine-tune", size_bytes=TOTAL_BYTES
        ).id


def add_part(world: World, upload_id: str, content: bytes, *, database: Database | None = None) -> str:
    with BlobWriter(world.blobs_dir, world.org_id) as writer:
        writer.write(content)
        writer.sync()
        with (database or world.database).write() as session:
            part = uploads.add_part(
                session, writer, upload_id, org_id=world.org_id, blobs_dir=world.blobs_dir
            )
            return part.id


def complete(world: World, upload_id: str, part_ids: list[str], *, database: Database | None = None) -> None:
    uploads.complete(
        database or world.database,
        upload_id,
        org_id=world.org_id,
        part_ids=part_ids,
        md5=None,
        blobs_dir=world.blobs_dir,
    )


def cancel(world: World, upload_id: str) -> None:
    uploads.cancel(world.database, upload_id, org_id=world.org_id, blobs_dir=world.blobs_dir)


def status(world: World, upload_id: str) -> str:
    with world.database.read() as session:
        return session.get_one(Upload, upload_id).status


def count(world: World, entity: type) -> int:
    with world.database.read() as session:
        return session.scalar(select(func.count()).select_from(entity)) or 0


def part_files(world: World) -> list[Path]:
    return [path for path in (world.blobs_dir / "parts").rglob("*") if path.is_file()]


def test_equal_completions_at_once_make_one_file(world: World):
    upload_id = begin(world)
    ids = [add_part(world, upload_id, half) for half in HALVES]

    outcomes = race(*[lambda: complete(world, upload_id, ids)] * 4)

    assert outcomes == [None] * 4
    assert count(world, File) == 1
    assert part_files(world) == []


class OvertakenDatabase(Database):
    """Lets something happen right after the first reading."""

    def __init__(self, url: str, overtake: Callable[[], object]) -> None:
        super().__init__(url)
        self._waiting = [overtake]

    @contextmanager
    def read(self) -> Iterator[Session]:
        with super().read() as session:
            yield session
        while self._waiting:
            self._waiting.pop()()


@pytest.mark.parametrize(
    ("overtake", "outcome"),
    [("the same completion", None), ("a cancel", Conflict), ("a failing disk", Corrupt)],
)
def test_parts_that_go_during_a_completion(world: World, overtake: str, outcome: type | None):
    upload_id = begin(world)
    ids = [add_part(world, upload_id, half) for half in HALVES]
    happens = {
        "the same completion": lambda: complete(world, upload_id, ids),
        "a cancel": lambda: cancel(world, upload_id),
        "a failing disk": lambda: shutil.rmtree(world.blobs_dir / "parts"),
    }
    database = OvertakenDatabase(world.database.url, happens[overtake])

    with nullcontext() if outcome is None else pytest.raises(outcome):
        complete(world, upload_id, ids, database=database)

    database.dispose()
    assert count(world, File) == (1 if outcome is None else 0)
    assert list((world.blobs_dir / "incoming").iterdir()) == []


def test_equal_parts_at_once_are_one(world: World):
    upload_id = begin(world)

    outcomes = race(*[lambda: add_part(world, upload_id, HALVES[0])] * 4)

    assert len(set(outcomes)) == 1
    assert (count(world, UploadPart), len(part_files(world))) == (1, 1)


def test_a_part_that_meets_a_cancel_leaves_nothing(world: World):
    upload_id = begin(world)

    outcomes = run_against_paused(
        world.database,
        lambda database: add_part(world, upload_id, HALVES[0], database=database),
        lambda: cancel(world, upload_id),
    )

    assert isinstance(outcomes[0], str)
    assert outcomes[1] is None
    assert (count(world, UploadPart), part_files(world)) == (0, [])


def test_a_part_that_comes_behind_a_cancel_is_refused(world: World):
    upload_id = begin(world)

    def end(session) -> None:
        session.get_one(Upload, upload_id, with_for_update=True).status = "cancelled"
        session.flush()

    _, outcome = run_against_open(world.database, end, lambda: add_part(world, upload_id, HALVES[0]))

    assert isinstance(outcome, Conflict)
    assert part_files(world) == []


def test_a_cancel_that_meets_a_completion_comes_too_late(world: World):
    upload_id = begin(world)
    ids = [add_part(world, upload_id, half) for half in HALVES]

    outcomes = run_against_paused(
        world.database,
        lambda database: complete(world, upload_id, ids, database=database),
        lambda: cancel(world, upload_id),
    )

    assert outcomes[0] is None
    assert isinstance(outcomes[1], Conflict)
    assert (status(world, upload_id), count(world, File)) == ("completed", 1)


def test_upkeep_collects_what_a_killed_process_left(world: World):
    pending, ended = begin(world), begin(world)
    add_part(world, pending, HALVES[0])
    add_part(world, ended, HALVES[0])
    world.run(
        update(Upload).where(Upload.id == ended).values(status="cancelled")
    )  # killed before it removed them
    abandoned, live = (BlobWriter(world.blobs_dir, world.org_id) for _ in range(2))
    old, new = sorted(world.blobs_dir.glob("incoming/*"), key=lambda path: path.stat().st_ino)
    os.utime(old, (time.time() - 3700, time.time() - 3700))

    upkeep.run(world.database, DatabaseSettings(home=world.home))

    assert [path.parent.name for path in part_files(world)] == [pending]
    assert list(world.blobs_dir.glob("incoming/*")) == [new]
    for writer in (abandoned, live):
        writer.__exit__(None, None, None)


def test_uploads_are_their_tenants_own(world: World):
    upload_id = begin(world)
    ids = [add_part(world, upload_id, half) for half in HALVES]
    other = world.other("clinic")

    for look in (
        lambda: add_part(other, upload_id, HALVES[0]),
        lambda: complete(other, upload_id, ids),
        lambda: cancel(other, upload_id),
    ):
        with pytest.raises(NotFound):
            look()
    assert status(world, upload_id) == "pending"
    with other.database.read() as session, pytest.raises(NotFound):
        uploads.see(session, upload_id, org_id=other.org_id)
