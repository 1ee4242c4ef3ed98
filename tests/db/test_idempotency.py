"""One key, one answer, one job, however often and however concurrently it is asked (G14)."""

from typing import Any

import pytest
from sqlalchemy import func, select

from db import idempotency, jobs
from db.errors import Conflict
from db.models import IdempotentRequest, Job
from tests.db.world import World, race


def submit(world: World, file_id: str, *, key: str = "k", request_hash: str = "h") -> dict[str, Any]:
    """What the API does: hold the key, look, create and remember in one transaction."""
    known_as: Any = {"org_id": world.org_id, "key": key}
    with world.database.write() as session:
        idempotency.hold(session, **known_as)
        known = idempotency.recall(session, **known_as, request_hash=request_hash)
        if known is not None:
            return known
        job = jobs.create(session, world.new_job(file_id), org_id=world.org_id)
        idempotency.remember(session, **known_as, request_hash=request_hash, response={"id": job.id})
        return {"id": job.id}


def count(world: World, entity: type) -> int:
    with world.database.read() as session:
        return session.execute(select(func.count()).select_from(entity)).scalar_one()


def test_concurrent_requests_with_one_key_make_one_job(world: World):
    file_id = world.add_file()

    answers = race(*[lambda: submit(world, file_id)] * 12)

    assert {answer["id"] for answer in answers} == {answers[0]["id"]}
    assert (count(world, Job), count(world, IdempotentRequest)) == (1, 1)
    assert submit(world, file_id) == answers[0]


def test_of_concurrent_requests_with_different_bodies_one_is_accepted(world: World):
    file_id = world.add_file()

    answers = race(
        *[lambda body=body: submit(world, file_id, request_hash=body) for body in ("a", "b", "c", "d")]
    )

    refused = [answer for answer in answers if isinstance(answer, Conflict)]
    assert [error.code for error in refused] == ["idempotency_key_reused"] * 3
    assert count(world, Job) == 1


def test_keys_of_two_tenants_do_not_meet(world: World):
    other = world.other("clinic")

    mine = submit(world, world.add_file(), request_hash="a")
    theirs = submit(other, other.add_file(), request_hash="b")

    assert mine != theirs
    assert count(world, Job) == 2


def test_an_unknown_key_has_no_answer(world: World):
    with world.database.read() as session:
        assert idempotency.recall(session, org_id=world.org_id, key="k", request_hash="h") is None


def test_a_request_that_failed_is_not_remembered(world: World):
    with pytest.raises(LookupError):
        submit(world, "file-none")

    assert count(world, IdempotentRequest) == 0
    assert submit(world, world.add_file())["id"].startswith("ftjob-")
