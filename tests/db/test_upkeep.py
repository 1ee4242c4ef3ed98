"""What time alone makes due is done, and nothing that is still needed goes with it."""

from sqlalchemy import func, select, update

from db import idempotency, upkeep
from db.models import File, IdempotentRequest
from db.settings import DatabaseSettings
from tests.db.world import World


def settings_of(world: World) -> DatabaseSettings:
    return DatabaseSettings(home=world.home)


def expire(world: World, *file_ids: str) -> None:
    world.run(update(File).where(File.id.in_(file_ids)).values(expires_at=1.0))


def file_ids(world: World) -> set[str]:
    with world.database.read() as session:
        return set(session.scalars(select(File.id)))


def test_expired_files_go_with_their_bytes(world: World):
    gone, kept = world.upload(b"gone"), world.upload(b"kept")
    expire(world, gone.id)
    world.run(update(File).where(File.id == kept.id).values(expires_at=2e10))

    upkeep.run(world.database, settings_of(world))

    assert file_ids(world) == {kept.id}
    assert [path.name for path in world.blobs_dir.glob("org-*/*/*")] == [kept.sha256]


def test_a_file_that_an_unfinished_job_needs_outlives_its_time(world: World):
    job = world.add_job()
    expire(world, job.training_file)

    upkeep.run(world.database, settings_of(world))
    assert job.training_file in file_ids(world)

    world.cancel(job.id)
    upkeep.run(world.database, settings_of(world))
    assert job.training_file not in file_ids(world)


def test_answers_are_kept_for_a_day(world: World):
    for key in ("old", "new"):
        with world.database.write() as session:
            idempotency.remember(
                session, org_id=world.org_id, key=key, request_hash="h", response={"id": key}
            )
    age = IdempotentRequest.created_at - idempotency.KEPT_S - 1
    world.run(update(IdempotentRequest).where(IdempotentRequest.key == "old").values(created_at=age))
    with world.database.read() as session:
        assert idempotency.recall(session, org_id=world.org_id, key="old", request_hash="h") is None

    upkeep.run(world.database, settings_of(world))

    with world.database.read() as session:
        assert session.scalars(select(IdempotentRequest.key)).all() == ["new"]
        assert session.scalar(select(func.count()).select_from(IdempotentRequest)) == 1
