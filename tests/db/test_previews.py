"""A question is put once a tenant, however many ask it at once, and nobody gets another's answer."""

from typing import Any

from sqlalchemy import func, select, update

from db import previews
from db.models import File, Model, Preview
from db.work_models import Task
from tests.db.world import World, race


def ask(world: World, file: File, model: Model, key: str = "a" * 64) -> str:
    with world.database.write() as session:
        return previews.ask(session, key, kind="rows", file=file, model=model, asked={}).id


def count(world: World, entity: Any, *conditions: Any) -> int:
    with world.database.read() as session:
        return session.scalar(select(func.count()).select_from(entity).where(*conditions)) or 0


def test_questions_at_once_are_one_task(world: World):
    file, model = world.upload(), world.add_model("m")

    found = race(*[lambda: ask(world, file, model)] * 8)

    assert set(found) == {found[0]}
    assert (count(world, Preview), count(world, Task, Task.kind == "preview")) == (1, 1)


def test_each_tenant_asks_for_itself(world: World):
    other = world.other("clinic")
    model = world.add_model("m")
    ids = {ask(world, world.upload(), model), ask(other, other.upload(), model)}
    assert len(ids) == 2
    for each in (world, other):
        with world.database.read() as session:
            found = previews.find(session, "a" * 64, org_id=each.org_id)
        assert found is not None
        assert found.org_id == each.org_id
        previews_of_each = count(world, Preview, Preview.org_id == each.org_id)
        assert previews_of_each == 1


def test_only_the_deleted_content_of_the_tenant_is_forgotten(world: World):
    other = world.other("clinic")
    model = world.add_model("m")
    mine, theirs = world.upload(b"same"), other.upload(b"same")
    ask(world, mine, model)
    kept = {ask(world, world.upload(), model, key="b" * 64), ask(other, theirs, model)}

    world.delete_file(mine.id)

    with world.database.read() as session:
        assert set(session.scalars(select(Preview.id))) == kept


def test_an_answer_is_given_until_its_time_is_over_and_then_asked_for_anew(world: World):
    file, model = world.upload(), world.add_model("m")
    first = ask(world, file, model)
    with world.database.write() as session:
        previews.record(session, first, {"rows": []})
    assert ask(world, file, model) == first

    world.run(update(Preview).values(expires_at=1.0))
    second = ask(world, file, model)

    assert second != first
    with world.database.write() as session:
        previews.record(session, first, {"rows": ["late"]})  # by a worker that was slow
    with world.database.read() as session:
        assert [preview.answer for preview in session.scalars(select(Preview))] == [None]


def test_it_goes_before_work_that_nobody_waits_for(world: World):
    world.upload()
    asked = ask(world, world.upload(), world.add_model("m"))
    assert world.take("cpu").subject_id == asked
