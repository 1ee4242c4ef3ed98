"""Training files are checked as they were uploaded: bytes that the disk has changed are noticed (G20)."""

import gzip

import pytest

from db import blobs, files
from db.models import File
from db.settings import DatabaseSettings
from tests.db.world import World
from tests.parquet import write_crashing
from trainers.rows.containers import MAX_LINE_BYTES
from workers import datasets
from workers.settings import WorkerSettings

ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@pytest.fixture
def settings(world: World, monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    monkeypatch.setenv("RESIDENCY_HOME", str(world.home))
    return WorkerSettings(node="node-1")


def check(world: World, settings: WorkerSettings, file_id: str) -> File:
    datasets.check(world.database, world.take("cpu"), settings)
    with world.database.read() as session:
        file = files.get(session, file_id, org_id=world.org_id)
        assert file.report is not None  # else it would not be there without the session
        return file


@pytest.mark.parametrize("damage", ["none", "changed", "cut", "gone"])
def test_a_file_is_checked_as_it_was_uploaded(world: World, settings: WorkerSettings, damage: str) -> None:
    file = world.upload(ROW)
    path = blobs.path_of(DatabaseSettings().blobs_dir, file.org_id, file.sha256)
    if damage == "gone":
        path.unlink()
    elif damage != "none":
        path.write_bytes(ROW[:-1] if damage == "cut" else ROW.replace(b"Hello", b"Hallo"))

    checked = check(world, settings, file.id)

    if damage == "none":
        assert (checked.status, checked.rows) == ("processed", 1)
        return
    assert checked.status == "error"
    assert checked.status_details is not None
    assert "have changed on the disk" in checked.status_details
    assert file.sha256 in checked.status_details


def test_a_file_that_its_reader_crashes_on_is_refused_at_once(world: World, settings: WorkerSettings) -> None:
    file = world.upload(write_crashing(), filename="rows.parquet")

    checked = check(world, settings, file.id)

    assert checked.status == "error"
    assert "its reader crashed on it" in str(checked.status_details)
    assert world.task(file.id, "validate").status == "closed"
    assert [attempt.outcome for attempt in world.attempts(file.id, "validate")] == ["done"]


HOSTILE = {  # filename, content, reasons
    "gzip bomb": ("a.jsonl.gz", gzip.compress(bytes(64 << 20)), {"too_large": 1}),
    "nul": ("a.jsonl", ROW + ROW.replace(b"Hi", b"H\0"), {"encoding": 1}),
    "mark": ("a.jsonl", b"\xef\xbb\xbf" + ROW, {"encoding": 1}),
    "utf-16": ("a.jsonl", ROW.decode().encode("utf-16"), {"encoding": 1}),
    "latin-1": ("a.csv", "prompt,completion\nQ,é\n".encode("latin-1"), {"encoding": 1}),
    "long line": ("a.jsonl", ROW + b"x" * (MAX_LINE_BYTES + 1) + b"\n" + ROW, {"too_long": 1}),
    "no parquet": ("a.parquet", ROW, {"unreadable": 1}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_is_refused_with_its_reason(
    world: World, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("RESIDENCY_MAX_UNPACKED_BYTES", str(48 << 20))
    filename, content, reasons = HOSTILE[name]
    file = world.upload(content, filename=filename)

    checked = check(world, settings, file.id)

    assert checked.status == "error"
    assert checked.report is not None
    assert checked.report["reasons"] == reasons
    assert [attempt.outcome for attempt in world.attempts(file.id, "validate")] == ["done"]
    assert list((world.home / "scratch").iterdir()) == []
