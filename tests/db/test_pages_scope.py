"""Pages neither skip nor repeat; nothing of another tenant is ever on one (G26)."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

import db
from db import checkpoints, deployments, events, files, job_queries, jobs, registry
from db.errors import Conflict, NotFound
from db.models import Checkpoint, Deployment, Event, File, Job
from db.pages import Page
from db.scope import scoped
from db.tables import Base, Owned
from tests.db.world import World


def walk(page: Callable[[str | None], Page], *, between: Callable[[], Any] = lambda: None) -> list[str]:
    """The ids of all pages, one after the other."""
    found: list[str] = []
    after = None
    while True:
        rows, has_more = page(after)
        found += [row.id for row in rows]
        assert len(found) < 100, "the pages go round in circles"
        if not has_more:
            return found
        after = found[-1]
        between()


def job_pages(world: World, *, limit: int = 3, status: str | None = None) -> Callable[[str | None], Page]:
    def page(after: str | None) -> Page:
        with world.database.read() as session:
            return job_queries.list_page(
                session, org_id=world.org_id, status=status, after=after, limit=limit
            )

    return page


def file_pages(world: World, *, descending: bool, purpose: str | None = None) -> Callable[[str | None], Page]:
    def page(after: str | None) -> Page:
        with world.database.read() as session:
            return files.list_page(
                session, org_id=world.org_id, purpose=purpose, after=after, limit=2, descending=descending
            )

    return page


def add_jobs(world: World, count: int) -> list[str]:
    file_id = world.add_file()
    return [world.add_job(file_id).id for _ in range(count)]


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_pages_of_jobs_created_at_one_moment(world: World, limit: int):
    made = add_jobs(world, 7)
    world.run(update(Job).values(created_at=5.0))

    assert walk(job_pages(world, limit=limit)) == sorted(made, reverse=True)


def test_the_newest_comes_first(world: World):
    made = add_jobs(world, 5)

    assert walk(job_pages(world)) == made[::-1]


def test_what_comes_in_between_moves_no_page(world: World):
    made = add_jobs(world, 7)
    file_id = world.add_file()

    assert walk(job_pages(world), between=lambda: world.add_job(file_id)) == made[::-1]


def test_has_more_is_exact(world: World):
    add_jobs(world, 3)

    assert [len(job_pages(world, limit=limit)(None).rows) for limit in (2, 3, 4)] == [2, 3, 3]
    assert [job_pages(world, limit=limit)(None).has_more for limit in (2, 3, 4)] == [True, False, False]


def test_jobs_by_status(world: World):
    made = add_jobs(world, 5)
    world.cancel(made[1])
    world.cancel(made[3])

    assert walk(job_pages(world, limit=1, status="cancelled")) == [made[3], made[1]]
    assert walk(job_pages(world, limit=1, status="queued")) == [made[4], made[2], made[0]]


def test_a_cursor_holds_although_its_job_has_moved_on(world: World):
    made = add_jobs(world, 4)
    page = job_pages(world, limit=2, status="queued")
    assert [job.id for job in page(None).rows] == [made[3], made[2]]

    world.cancel(made[2])

    assert [job.id for job in page(made[2]).rows] == [made[1], made[0]]


@pytest.mark.parametrize("descending", [True, False])
def test_pages_of_files_in_both_directions(world: World, descending: bool):
    made = [world.upload(purpose="batch").id for _ in range(5)]
    world.upload()
    world.run(update(File).values(created_at=5.0))

    assert walk(file_pages(world, descending=descending, purpose="batch")) == sorted(made, reverse=descending)


def test_pages_of_events_in_both_directions(world: World):
    (job_id,) = add_jobs(world, 1)
    add_jobs(world, 2)
    with world.database.write() as session:
        job = jobs.get(session, job_id, org_id=world.org_id)
        for step in range(5):
            events.add(session, job, f"Step {step}", type_="metrics", data={"step": step})
    world.run(update(Event).values(created_at=5.0))
    expected = [event.id for event in world.events(job_id)]

    def page(after: str | None, *, descending: bool) -> Page:
        with world.database.read() as session:
            return events.list_page(
                session, org_id=world.org_id, job_id=job_id, after=after, limit=2, descending=descending
            )

    assert walk(lambda after: page(after, descending=False)) == expected
    assert walk(lambda after: page(after, descending=True)) == expected[::-1]


def test_pages_of_deployments(world: World):
    made = []
    for number in range(5):
        model = world.add_model(f"m{number}", kind="merged", public=False)
        with world.database.write() as session:
            made.append(deployments.ensure(session, model, org_id=world.org_id, auto=False).id)
    world.run(update(Deployment).values(created_at=5.0))

    def page(after: str | None) -> Page:
        with world.database.read() as session:
            return deployments.list_page(session, org_id=world.org_id, after=after, limit=2)

    assert walk(page) == sorted(made, reverse=True)


def test_checkpoints_are_replaced_listed_and_forgotten(world: World, tmp_path: Path):
    (job_id,) = add_jobs(world, 1)

    def record(step: int, folder: str) -> None:
        (tmp_path / folder).mkdir()
        with world.database.write() as session:
            job = jobs.get(session, job_id, org_id=world.org_id)
            checkpoints.record(
                session,
                job,
                step=step,
                path=tmp_path / folder,
                manifest_sha256="a" * 64,
                metrics={"train_loss": 1.5},
            )

    def listed(after: str | None = None) -> list[Checkpoint]:
        with world.database.read() as session:
            return checkpoints.list_page(
                session, org_id=world.org_id, job_id=job_id, after=after, limit=10
            ).rows

    for step in (10, 2, 30):
        record(step, f"1-{step}")
    record(10, "2-10")

    assert [row.step for row in listed()] == [30, 10, 2]
    assert listed()[1].path == str(tmp_path / "2-10")
    assert [row.step for row in listed(listed()[0].id)] == [10, 2]
    (tmp_path / "1-2").rmdir()
    with world.database.write() as session:
        checkpoints.forget_missing(session, jobs.get(session, job_id, org_id=world.org_id))
    assert [row.step for row in listed()] == [30, 10]


def test_an_unknown_cursor_is_refused(world: World):
    other = world.other("clinic")
    add_jobs(world, 1)
    foreign = add_jobs(other, 1)[0]
    deleted = world.add_file()
    world.run(delete(File).where(File.id == deleted))

    for page, cursor in (
        (job_pages(world), "ftjob-none"),
        (job_pages(world), foreign),
        (file_pages(world, descending=True), deleted),
    ):
        with pytest.raises(Conflict) as caught:
            page(cursor)
        assert (caught.value.code, caught.value.param) == ("invalid_value", "after")


def test_another_tenant_sees_nothing(world: World, tmp_path: Path):
    other = world.other("clinic")
    model = world.add_model("mine", kind="merged", public=False)
    file_id = world.add_file()
    job = world.add_job(file_id, model="mine")
    with world.database.write() as session:
        deployment = deployments.ensure(session, model, org_id=world.org_id, auto=False)
        checkpoints.record(session, job, step=1, path=tmp_path, manifest_sha256="a", metrics={})
    org_id = other.org_id

    with world.database.read() as session:
        for look in (
            lambda: jobs.get(session, job.id, org_id=org_id),
            lambda: files.get(session, file_id, org_id=org_id),
            lambda: registry.get(session, "mine", org_id=org_id),
            lambda: deployments.get(session, deployment.id, org_id=org_id),
        ):
            with pytest.raises(NotFound):
                look()
        assert deployments.find_live(session, model, org_id=org_id) is None
        assert [found.id for found in registry.list_all(session, org_id=org_id)] == ["base"]
        by_job = {"org_id": org_id, "job_id": job.id, "after": None, "limit": 9}
        pages = [events.list_page(session, **by_job), checkpoints.list_page(session, **by_job)]
        pages.append(deployments.list_page(session, org_id=org_id, after=None, limit=9))
    pages += [job_pages(other)(None), file_pages(other, descending=True)(None)]
    assert [page.rows for page in pages] == [[]] * 5
    for changes in ({"training_file": file_id}, {"model": "mine", "training_file": other.add_file()}):
        with pytest.raises(NotFound):
            other.add_job(**changes)


def test_every_owned_table_has_a_scope(world: World):
    """`scoped` works on all of them, and no other table names a tenant."""
    owned = {
        str(mapper.local_table): mapper.class_
        for mapper in Base.registry.mappers
        if issubclass(mapper.class_, Owned)
    }
    with_tenant = [table for table in Base.metadata.sorted_tables if "org_id" in table.columns]
    assert set(owned) == {table.name for table in with_tenant}
    assert not any(table.columns["org_id"].nullable for table in with_tenant)

    with world.database.read() as session:
        for name, entity in owned.items():
            seen = session.scalars(scoped(entity, "org-none")).all()
            assert len(seen) == (1 if name == "models" else 0), "only the public base model"


def tenant_filters(source: str) -> list[int]:
    """Lines of `source` that narrow rows to a tenant: `X.org_id == value`, `filter_by(org_id=...)` or SQL."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            of_org = [side for side in sides if isinstance(side, ast.Attribute) and side.attr == "org_id"]
            columns = [side for side in sides if isinstance(side, ast.Attribute)]
            # a comparison of two columns is a join
            if of_org and len(columns) < len(sides):
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {keyword.arg for keyword in node.keywords}
            narrows = node.func.attr in ("filter_by", "in_", "is_")
            of_org = isinstance(node.func.value, ast.Attribute) and node.func.value.attr == "org_id"
            if (narrows and "org_id" in keywords) or (narrows and of_org):
                lines.append(node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "org_id =" in node.value:
            lines.append(node.lineno)
    return lines


def test_rows_are_narrowed_to_a_tenant_in_one_place_only():
    folder = Path(str(db.__file__)).parent
    found = {path.name: tenant_filters(path.read_text()) for path in folder.glob("*.py")}

    assert [name for name, lines in found.items() if lines] == ["scope.py"]
    assert len(found["scope.py"]) == 3  # two in `scoped`, one in `owns`


@pytest.mark.parametrize(
    "source",
    [
        "select(Job).where(Job.org_id == org_id)",
        "select(Job).where(org_id == Job.org_id)",
        "select(Job).where(Job.org_id.in_(orgs))",
        "query.filter_by(org_id=org_id)",
        "text('SELECT * FROM jobs WHERE org_id = :org')",
    ],
)
def test_the_search_for_such_filters_finds_them(source: str):
    assert tenant_filters(source) == [1]
