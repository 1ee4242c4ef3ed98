"""Curves of a job: every number it reports, thinned out without losing a peak, and cheap to ask for again."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event as hooks
from sqlalchemy import insert, inspect, text

from api.curves import read_series, thin
from db import events
from db.models import Job

JOBS = "/v1/fine_tuning/jobs"
on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def job_id(client, world) -> str:
    body = {"model": world.base_model(), "training_file": world.file()}
    return client.post(JOBS, json=body).json()["id"]


def report(world, job_id: str, *records: dict[str, Any]) -> None:
    """What a worker copies from its trainer."""
    with world.database.write() as session:
        job = session.get_one(Job, job_id)
        for record in records:
            events.add(session, job, "Step", type_="metrics", data={"total_steps": 9} | record)


@on_both
def test_every_number_is_a_series(client, world, job_id):
    path = f"{JOBS}/{job_id}/curves"
    none = {"object": "fine_tuning.job.curves", "job_id": job_id, "last_step": None, "total_steps": None}
    assert client.get(path).json() == none | {"series": {}}
    report(
        world,
        job_id,
        {"step": 1, "train_loss": 2.5, "valid_loss": None, "learning_rate": 1e-5, "note": "x", "done": True},
        {"step": 2, "train_loss": None, "valid_loss": 2.25, "learning_rate": 2e-5},
        {"step": 3, "train_loss": 1, "reward": -0.5},
    )
    assert client.get(path).json() == none | {
        "last_step": 3,
        "total_steps": 9,
        "series": {
            "learning_rate": {"steps": [1, 2], "values": [1e-5, 2e-5]},
            "reward": {"steps": [3], "values": [-0.5]},
            "train_loss": {"steps": [1, 3], "values": [2.5, 1.0]},
            "valid_loss": {"steps": [2], "values": [2.25]},
        },
    }


def test_a_step_that_was_trained_again_counts_as_it_went_the_last_time(client, world, job_id):
    report(world, job_id, *({"step": step, "train_loss": 9.0} for step in (1, 2, 3)))
    report(world, job_id, *({"step": step, "train_loss": 1.0} for step in (2, 3, 4)))
    seen = client.get(f"{JOBS}/{job_id}/curves").json()
    assert seen["series"] == {"train_loss": {"steps": [1, 2, 3, 4], "values": [9.0, 1.0, 1.0, 1.0]}}
    assert seen["last_step"] == 4


def test_whoever_asks_again_is_told_only_what_is_new(client, world, job_id):
    report(world, job_id, {"step": 1, "train_loss": 2.5})
    path = f"{JOBS}/{job_id}/curves"
    tag = client.get(path).headers["etag"]
    for header in (tag, f'W/"1-2", {tag}'):
        same = client.get(path, headers={"if-none-match": header})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    assert client.get(path, params={"max_points": 4}, headers={"if-none-match": tag}).status_code == 200
    report(world, job_id, {"step": 2, "train_loss": 2.0})
    news = client.get(path, headers={"if-none-match": tag})
    assert (news.status_code, news.json()["last_step"]) == (200, 2)
    assert news.headers["etag"] != tag


def test_a_long_run_is_thinned_to_500_points_a_series(client, world, job_id):
    report(world, job_id, *({"step": step, "a": step / 7.0, "b": -step / 7.0} for step in range(1, 1001)))
    series = client.get(f"{JOBS}/{job_id}/curves").json()["series"]
    assert {name: len(curve["steps"]) for name, curve in series.items()} == {"a": 500, "b": 500}


def test_what_is_refused(client, job_id, as_stranger):
    path = f"{JOBS}/{job_id}/curves"
    assert client.get(path, headers=as_stranger).status_code == 404
    for wrong in (3, 10_001, "many"):
        error = client.get(path, params={"max_points": wrong}).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "max_points")


@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=300),
    max_points=st.integers(4, 60),
)
def test_thinning_keeps_the_ends_and_the_extremes(values, max_points):
    points = [(3 * index, value) for index, value in enumerate(values)]
    kept = thin(points, max_points=max_points)
    assert len(kept) <= max_points
    assert set(kept) <= set(points)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    if len(points) <= max_points:
        assert kept == points
        return
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (min(value for _, value in kept), max(value for _, value in kept)) == (min(values), max(values))
    # Not only those of the whole: wherever one looks, the next point that is kept is near.
    longest = max(after - before for (before, _), (after, _) in itertools.pairwise(kept))
    assert longest <= 3 * 2 * math.ceil(len(points) / ((max_points - 2) // 2))


@given(
    st.lists(
        st.fixed_dictionaries(
            {"step": st.integers(0, 20), "total_steps": st.just(20)},
            optional={name: st.none() | st.floats() | st.booleans() | st.just("x") for name in "abc"},
        )
    )
)
def test_series_hold_numbers_only_by_rising_step(records):
    last: dict[tuple[str, int], float] = {}
    for record in records:
        for name in "abc":
            if isinstance(record.get(name), float) and math.isfinite(record[name]):
                last[name, record["step"]] = record[name]
    series = read_series(records)
    for points in series.values():
        assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert {(name, step): value for name, points in series.items() for step, value in points} == last


# Step after step of all jobs, as if they ran side by side: no job's rows lie together.
MANY_STEPS = """
WITH RECURSIVE steps(step) AS (SELECT 1 UNION ALL SELECT step + 1 FROM steps WHERE step < 100)
INSERT INTO events (id, org_id, job_id, level, type, message, data, created_at)
SELECT jobs.id || '-' || step, org_id, jobs.id, 'info', 'metrics', 'Step',
  '{"step": 1, "total_steps": 9}', step
FROM steps CROSS JOIN jobs ORDER BY step
"""


@on_both
def test_what_is_asked_of_one_job_reads_no_events_of_others(client, world, job_id):
    """By the plans of both databases. What it takes among millions, benchmarks/dashboard.py measures."""
    with world.database.write() as session:
        job = session.get_one(Job, job_id)
        columns = {each.columns[0].name: getattr(job, each.key) for each in inspect(Job).column_attrs}
        rows = [columns | {"id": f"ftjob-{index:04}"} for index in range(299)]
        session.execute(insert(inspect(Job).local_table), rows)
        session.execute(text(MANY_STEPS))
        session.execute(text("ANALYZE"))
    report(world, job_id, {"step": 101, "train_loss": 1.5})
    asked: list[tuple[str, Any]] = []

    def note(*call: Any) -> None:
        if "FROM events" in call[2]:
            asked.append((call[2], call[3]))

    hooks.listen(world.database.engine, "before_cursor_execute", note)
    assert len(client.get(JOBS).json()["data"]) == 20
    assert not asked, "the list of jobs reads no events at all"
    series = client.get(f"{JOBS}/{job_id}/curves").json()["series"]
    hooks.remove(world.database.engine, "before_cursor_execute", note)
    assert series == {"train_loss": {"steps": [101], "values": [1.5]}}
    assert len(asked) == 2, "the newest, for the tag, and the metrics"
    sqlite = world.database.engine.dialect.name == "sqlite"
    explain, scan = ("EXPLAIN QUERY PLAN", "SCAN events") if sqlite else ("EXPLAIN", "Seq Scan on events")
    with world.database.engine.connect() as connection:
        for sql, values in asked:
            plan = [str(step[-1]) for step in connection.exec_driver_sql(f"{explain} {sql}", values)]
            assert not [step for step in plan if scan in step], sql
