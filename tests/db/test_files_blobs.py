"""Uploads: the bytes are what was sent, once per tenant, and no row is ever without them (G20)."""

import hashlib
import os
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from db import blobs, files, jobs, tasks
from db.blobs import BlobWriter
from db.errors import Conflict, NotFound
from db.models import File, Job
from tests.db.world import ERROR, World, race, run_against_open, run_against_paused

CONTENT = b'{"messages": []}\n'


def kept(world: World) -> list[Path]:
    """All bytes that lie under their final name."""
    return [path for path in world.blobs_dir.rglob("*") if path.is_file() and path.parent.name != "incoming"]


def incoming(world: World) -> list[Path]:
    return list((world.blobs_dir / "incoming").iterdir())


def blob_of(world: World, file: File) -> Path:
    return blobs.path_of(world.blobs_dir, file.org_id, file.sha256)


def assert_rows_and_bytes_agree(world: World) -> None:
    with world.database.read() as session:
        recorded = {blob_of(world, file) for file in session.scalars(select(File))}
    assert set(kept(world)) == recorded
    for path in recorded:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert incoming(world) == []


def test_content_is_what_was_sent(world: World):
    chunks = [os.urandom(700_000) for _ in range(4)]
    with BlobWriter(world.blobs_dir, world.org_id) as writer:
        for chunk in chunks:
            writer.write(chunk)
        writer.sync()
        with world.database.write() as session:
            file = files.create(
                session, writer, org_id=world.org_id, filename="../../etc/x", purpose="fine-tune"
            )

    assert file.sha256 == hashlib.sha256(b"".join(chunks)).hexdigest()
    assert (file.bytes, file.filename, file.status) == (2_800_000, "../../etc/x", "uploaded")
    assert list(blobs.read_chunks(blob_of(world, file))) == [
        b"".join(chunks)[start : start + (1 << 20)] for start in range(0, 2_800_000, 1 << 20)
    ]
    assert blob_of(world, file).is_relative_to(world.blobs_dir / world.org_id)
    assert_rows_and_bytes_agree(world)


def test_an_empty_file_is_a_file(world: World):
    file = world.upload(b"")

    assert (file.bytes, blob_of(world, file).read_bytes()) == (0, b"")


def test_equal_bytes_are_stored_once_a_tenant(world: World):
    first, second = world.upload(CONTENT), world.upload(CONTENT)
    elsewhere = world.other("clinic").upload(CONTENT)

    assert first.id != second.id
    assert first.sha256 == second.sha256 == elsewhere.sha256
    assert len(kept(world)) == 2
    assert_rows_and_bytes_agree(world)


def test_an_aborted_upload_leaves_nothing(world: World):
    def upload_half() -> None:
        with BlobWriter(world.blobs_dir, world.org_id) as writer:
            writer.write(CONTENT)
            assert len(incoming(world)) == 1
            raise ConnectionError("the client went away")

    with pytest.raises(ConnectionError):
        upload_half()

    assert incoming(world) == kept(world) == []


def test_an_upload_that_cannot_be_recorded_leaves_no_temporary_file(world: World):
    nobody = World(world.database, world.home, "org-none")

    with pytest.raises(IntegrityError):
        nobody.upload(CONTENT)

    assert incoming(world) == []
    with world.database.read() as session:
        assert session.scalars(select(File)).all() == []


def test_only_training_files_are_checked(world: World):
    training, other = world.upload(), world.upload(purpose="batch")

    assert (training.status, other.status) == ("uploaded", "processed")
    lease = world.take("cpu")
    assert (lease.kind, lease.subject_id) == ("validate", training.id)
    assert world.claim("cpu") is None


def test_a_check_is_recorded(world: World):
    good, bad = world.upload(), world.upload()

    with world.database.write() as session:
        files.record_check(session, good.id, report={"rows": 12, "tokens": 34}, error=None)
        files.record_check(session, bad.id, report={"rows": 2}, error="Line 2: not JSON")
        files.record_check(session, "file-deleted", report={"rows": 2}, error=None)

    with world.database.read() as session:
        found = [files.get(session, file.id, org_id=world.org_id) for file in (good, bad)]
        report = found[0].report  # only where it is asked for
    assert [(file.status, file.status_details, file.rows) for file in found] == [
        ("processed", None, 12),
        ("error", "Line 2: not JSON", 2),
    ]
    assert report == {"rows": 12, "tokens": 34}


def test_deletion_takes_the_bytes_and_the_check_along(world: World):
    file = world.upload(CONTENT)

    world.delete_file(file.id)

    assert kept(world) == []
    assert world.claim("cpu") is None
    with world.database.read() as session, pytest.raises(NotFound):
        files.get(session, file.id, org_id=world.org_id)
    with pytest.raises(NotFound):
        world.delete_file(file.id)


def test_deletion_keeps_bytes_that_another_file_shares(world: World):
    first, second = world.upload(CONTENT), world.upload(CONTENT)
    elsewhere = world.other("clinic").upload(CONTENT)

    world.delete_file(first.id)
    assert blob_of(world, second).read_bytes() == CONTENT
    world.delete_file(second.id)

    assert kept(world) == [blob_of(world, elsewhere)]


def test_another_tenant_cannot_delete_a_file(world: World):
    file = world.upload(CONTENT)

    with pytest.raises(NotFound):
        world.other("clinic").delete_file(file.id)

    assert blob_of(world, file).read_bytes() == CONTENT
    assert world.take("cpu").subject_id == file.id


@pytest.mark.parametrize("role", ["training_file", "validation_file"])
def test_a_file_in_use_is_not_deleted(world: World, role: str):
    used = world.upload(CONTENT)
    chosen = {"training_file": world.add_file(), "validation_file": world.add_file()} | {role: used.id}
    job = world.add_job(**chosen)

    for prepare in (lambda: None, lambda: world.check(used.id), lambda: world.claim()):
        prepare()
        with pytest.raises(Conflict) as caught:
            world.delete_file(used.id)
        assert caught.value.code == "file_in_use"
        assert job.id in str(caught.value)
    assert blob_of(world, used).read_bytes() == CONTENT

    lease = world.attempts(job.id)
    with world.database.write() as session:
        found = tasks.lease_of(session, lease[0].id)
        assert found is not None
        jobs.fail(session, found, error=ERROR)
    world.delete_file(used.id)
    assert not blob_of(world, used).exists()


def test_an_upload_and_a_deletion_of_equal_bytes(world: World):
    file = world.upload(CONTENT)
    for _ in range(30):
        uploaded, deleted = race(lambda: world.upload(CONTENT), lambda file=file: world.delete_file(file.id))

        assert deleted is None
        assert isinstance(uploaded, File)
        assert_rows_and_bytes_agree(world)
        file = uploaded


def test_an_upload_not_yet_committed_keeps_its_bytes_from_a_deletion(world: World):
    old = world.upload(CONTENT)

    new, deleted = run_against_paused(
        world.database,
        lambda paused: world.upload(CONTENT, database=paused),
        lambda: world.delete_file(old.id),
    )

    assert isinstance(new, File)
    assert deleted is None
    assert_rows_and_bytes_agree(world)
    assert blob_of(world, new).read_bytes() == CONTENT


def test_many_uploads_and_deletions_of_equal_bytes(world: World):
    def come_and_go() -> None:
        for _ in range(6):
            world.delete_file(world.upload(CONTENT).id)

    outcomes = race(*[come_and_go] * 6, lambda: world.upload(CONTENT))

    assert outcomes[:6] == [None] * 6
    assert kept(world) == [blob_of(world, outcomes[6])]
    assert_rows_and_bytes_agree(world)


def test_a_file_is_deleted_once(world: World):
    file = world.upload(CONTENT)

    outcomes = race(*[lambda: world.delete_file(file.id)] * 4)

    assert sum(outcome is None for outcome in outcomes) == 1
    assert sum(isinstance(outcome, NotFound) for outcome in outcomes) == 3
    assert kept(world) == []


def test_a_deletion_and_a_job_on_the_same_file(world: World):
    for _ in range(20):
        file_id = world.add_file()

        created, deleted = race(
            lambda file_id=file_id: world.add_job(file_id), lambda file_id=file_id: world.delete_file(file_id)
        )

        if isinstance(created, Job):
            assert isinstance(deleted, Conflict)
        else:
            assert (type(created), deleted) == (NotFound, None)


def test_a_job_not_yet_committed_keeps_its_file(world: World):
    file_id = world.add_file()

    job, deleted = run_against_open(
        world.database,
        lambda session: jobs.create(session, world.new_job(file_id), org_id=world.org_id),
        lambda: world.delete_file(file_id),
    )

    assert isinstance(deleted, Conflict)
    assert job.id in str(deleted)


def test_a_file_being_deleted_gets_no_new_job(world: World):
    file_id = world.add_file()

    deleted, created = run_against_paused(
        world.database,
        lambda paused: world.delete_file(file_id, database=paused),
        lambda: world.add_job(file_id),
    )

    assert deleted is None
    assert isinstance(created, NotFound)
