"""The dashboard on a thousand jobs of two thousand steps each: lists, curves and pages, on both databases.

`python benchmarks/dashboard.py [--jobs 1000] [--points 2000] [--requests 100] [--visits 10] [--out FILE]`
fills a SQLite file and then a PostgreSQL, each with an API and a dashboard of its own. The pages' client asks
for pages of the list, for the curves of one job, and for those of four, one after the other as the comparison
does; for other jobs each time. Then Chromium, which has been to either page once, goes to the list and to a
job in turn, until all rows and all lines are drawn. One curve of each job has one spike, which has to be in
every answer, however few points that has.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import secrets
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pgserver.postgres_server import get_server
from playwright.sync_api import Page, sync_playwright
from sqlalchemy import insert, text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from api.dashboard.client import Api, connect  # noqa: E402
from api.dashboard.curves import fetch_curves  # noqa: E402
from benchmarks.job_queue import quantiles, serve  # noqa: E402
from db import events, jobs, keys, tasks  # noqa: E402
from db.migrate import upgrade  # noqa: E402
from db.models import Event, Job  # noqa: E402
from db.session import Database  # noqa: E402
from db.tasks import Lease, Owner  # noqa: E402
from tests.browser.conftest import ARGS, CHROMIUM, PATIENCE_MS, start_dashboard  # noqa: E402
from tests.db.world import World, claim  # noqa: E402
from trainers.specs import parse_method, resolve  # noqa: E402

T = TypeVar("T")
TARGET_MS = {"list": 100, "curves": 500}
JOBS = "/v1/fine_tuning/jobs"
# What api/dashboard asks for: rows of a page of the list, points of each curve on a job's page, and compared.
PAGE_ROWS, ALONE_POINTS, COMPARED_POINTS = 25, 500, 300
SPIKED, SPIKE = "grad_norm", 97.5  # far above the rest of it
CHARTS = 5  # of a job's page: what `describe_point` measures, without the epoch and the time of a step
ROWS_PER_TRANSACTION = 20_000
LINE = ".charts svg path[stroke-linejoin=bevel]"
ROW = "table tbody a[href^='/jobs/ftjob-']"


@dataclass(frozen=True)
class Filled:
    """A database with jobs: the step of each job's spike, and what opens the API on it."""

    spikes: dict[str, int]
    key: str
    pepper: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="at least 4")
    parser.add_argument("--points", type=int, default=2000, help="steps that each job has measured")
    parser.add_argument("--requests", type=int, default=100, help="of each kind")
    parser.add_argument("--visits", type=int, default=10, help="of each page")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cpus, load = len(os.sched_getaffinity(0)), round(os.getloadavg()[0], 2)
    result: dict[str, Any] = {
        "benchmark": "dashboard",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": cpus, "python": sys.version.split()[0], "load_before": load},
        "jobs": options.jobs,
        "points": options.points,
        "target_p95_ms": TARGET_MS,
    }
    for name in ("sqlite", "postgresql"):
        with tempfile.TemporaryDirectory(prefix="residency-dashboard-") as folder:
            with start_database(name, Path(folder)) as url:
                result[name] = measure(Path(folder), url, options)
        sys.stderr.write(f"{name}: {json.dumps(result[name])}\n")
    told = json.dumps(result, indent=1)
    print(told)
    if options.out:
        options.out.write_text(told + "\n")


@contextmanager
def start_database(name: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if name == "sqlite":
        yield f"sqlite:///{folder / 'residency.db'}"
        return
    server = get_server(str(folder / "postgres"), cleanup_mode="stop")
    try:
        yield server.get_uri().replace("postgresql:", "postgresql+psycopg:")
    finally:
        server.cleanup()


def measure(folder: Path, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, on an empty database."""
    began = time.perf_counter()
    filled = fill(folder, url, n_jobs=options.jobs, n_points=options.points)
    filled_s = time.perf_counter() - began
    with serve(folder, url, pepper=filled.pepper) as (port, _):
        api_url = f"http://127.0.0.1:{port}"
        asked = asyncio.run(ask(api_url, filled, n_requests=options.requests))
        process, dashboard_url = start_dashboard(api_url, folder / "dashboard.log")
        try:
            visited = visit_pages(dashboard_url, filled, n_visits=options.visits)
        finally:
            process.terminate()
            process.wait(timeout=60)
    return {"filled_s": round(filled_s, 1), **asked, **visited}


def fill(folder: Path, url: str, *, n_jobs: int, n_points: int) -> Filled:
    """Jobs that ran side by side, and have succeeded."""
    database = Database(url)
    upgrade(database)
    pepper = secrets.token_hex(32)
    with database.write() as session:
        org = keys.ensure_default_org(session)
        key = keys.create(session, org_id=org.id, name="benchmark", role="user", pepper=pepper)
    world = World(database, folder)
    world.add_model()
    leases = start_jobs(world, n_jobs=n_jobs, n_points=n_points)
    spikes = add_points(world, [lease.subject_id for lease in leases], n_points=n_points)
    for lease in leases:
        end_job(world, lease, n_points=n_points)
    if database.engine.dialect.name == "postgresql":  # as autovacuum does soon, but not while we measure
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text("VACUUM ANALYZE"))
    database.dispose()
    return Filled(spikes, key=key, pepper=pepper)


def start_jobs(world: World, *, n_jobs: int, n_points: int) -> list[Lease]:
    """Jobs on one checked file, each claimed by a node of its own, with all their hyperparameters."""
    method = parse_method({"type": "supervised"}, None)
    resolved = resolve(method, n_examples=n_points, seed=7)
    file_id = world.add_file()
    leases = []
    for number in range(n_jobs):
        new = world.new_job(file_id, suffix=f"run-{number}", spec={"method": method.to_request()})
        with world.database.write() as session:
            jobs.create(session, new, org_id=world.org_id)
            lease = claim(session, owner=Owner(node=f"node-{number}", pid=1, started_at=1.0), ttl_s=1e6)
            assert lease is not None
            jobs.start(session, lease, resolved=resolved)
        leases.append(lease)
    return leases


def add_points(world: World, job_ids: Sequence[str], *, n_points: int) -> dict[str, int]:
    """The metrics as workers copy them, in the order of steps: no job's rows lie together.

    The step of each job's spike, which is neither the first nor the last: those are always kept.
    """
    chance = random.Random(0)  # noqa: S311
    spikes = {job_id: chance.randint(2, n_points - 1) for job_id in job_ids}
    rows = (
        describe_point(chance, world.org_id, job_id, step, n_points=n_points, spikes=step == spikes[job_id])
        for step in range(1, n_points + 1)
        for job_id in job_ids
    )
    while batch := list(itertools.islice(rows, ROWS_PER_TRANSACTION)):
        with world.database.write() as session:
            session.execute(insert(Event), batch)
    return spikes


def describe_point(
    chance: random.Random, org_id: str, job_id: str, step: int, *, n_points: int, spikes: bool
) -> dict[str, Any]:
    """The row of one metrics event, with what a supervised job measures at a step."""
    data = {
        "train_loss": 3.0 * 0.999**step + chance.random(),
        "train_mean_token_accuracy": min(0.9, step / n_points) + chance.random() / 10,
        "learning_rate": 2e-4 * (1 - step / n_points),
        SPIKED: SPIKE if spikes else 1 + chance.random(),
        "epoch": 3 * step / n_points,
        "step_time_s": 0.5 + chance.random() / 10,
        "tokens_per_s": 4000 + 500 * chance.random(),
    }
    return {
        # As `db.ids` makes them, from a source that is fast rather than secret.
        "id": "ftevent-" + "".join(chance.choices(string.ascii_letters + string.digits, k=24)),
        "org_id": org_id,
        "job_id": job_id,
        "level": "info",
        "type": "metrics",
        "message": events.describe_metrics(step, n_points, data),
        "data": {"step": step, "total_steps": n_points, **data},
        "created_at": time.time(),
    }


def end_job(world: World, lease: Lease, *, n_points: int) -> None:
    """The job came to its last step, and is merged."""
    progress = {"step": n_points, "total_steps": n_points, "percent": 100.0, "eta_seconds": 0.0}
    with tasks.fenced(world.database, lease) as session:
        jobs.set_progress(session, session.get_one(Job, lease.subject_id), progress)
    world.train(lease)
    world.merge(world.take("cpu"))


async def ask(url: str, filled: Filled, *, n_requests: int) -> dict[str, Any]:
    """What the pages' own client waits for, one request at a time, with checked curves."""
    chance = random.Random(1)  # noqa: S311
    lists, alone, compared = [], [], []
    async with connect(url) as http:
        api = Api(http, filled.key)
        await api.get("/v1/methods")  # opens the connection, as the page of the list does
        after: str | None = None
        for _ in range(n_requests):  # from the newest to the oldest, and again
            took_s, page = await timed(api.get(JOBS, limit=PAGE_ROWS, after=after))
            lists.append(took_s)
            after = page["data"][-1]["id"] if page["has_more"] else None
        for _ in range(n_requests):
            took_s, curves = await timed(fetch_curves(api, chance.choice(list(filled.spikes))))
            check_spike(curves, filled, at_most=ALONE_POINTS)
            alone.append(took_s)
        for _ in range(n_requests):
            took = [
                await timed(fetch_curves(api, job_id, max_points=COMPARED_POINTS))
                for job_id in chance.sample(list(filled.spikes), 4)
            ]
            for _, curves in took:
                check_spike(curves, filled, at_most=COMPARED_POINTS)
            compared.append(sum(took_s for took_s, _ in took))
    return {"list_ms": quantiles(lists), "curves_ms": quantiles(alone), "four_curves_ms": quantiles(compared)}


async def timed(request: Awaitable[T]) -> tuple[float, T]:
    """Seconds until the answer is there and read, and the answer."""
    began = time.perf_counter()
    answer = await request
    return time.perf_counter() - began, answer


def check_spike(curves: dict[str, Any], filled: Filled, *, at_most: int) -> None:
    """The spike is there at its step, in a curve of no more points than were asked for."""
    curve = curves["series"][SPIKED]
    assert len(curve["steps"]) <= at_most, len(curve["steps"])
    step = filled.spikes[curves["job_id"]]
    found = [point for point in zip(curve["steps"], curve["values"], strict=True) if point[1] == SPIKE]
    assert found == [(step, SPIKE)], (curves["job_id"], step, found)


def visit_pages(url: str, filled: Filled, *, n_visits: int) -> dict[str, Any]:
    """Milliseconds from the navigation until all rows of the list, and all lines of a job, are drawn."""
    chance = random.Random(2)  # noqa: S311
    took: dict[str, list[float]] = {"jobs_page_ms": [], "job_page_ms": []}
    n_rows = min(PAGE_ROWS, len(filled.spikes))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{url}/login")
        page.get_by_label("Key").fill(filled.key)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{url}/")
        for _ in range(1 + n_visits):
            took["jobs_page_ms"].append(visit(page, f"{url}/jobs", shows=ROW, count=n_rows))
            job_id = chance.choice(list(filled.spikes))
            took["job_page_ms"].append(visit(page, f"{url}/jobs/{job_id}", shows=LINE, count=CHARTS))
        browser.close()
    return {name: spread(times[1:]) for name, times in took.items()}


def visit(page: Page, address: str, *, shows: str, count: int) -> float:
    """Milliseconds until so many elements are visible that `shows` selects."""
    began = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.locator(shows).nth(count - 1).wait_for()
    return (time.perf_counter() - began) * 1000


def spread(times: list[float]) -> dict[str, float]:
    """Median and range."""
    found = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    return {"n": len(times)} | {name: round(value, 1) for name, value in found.items()}


if __name__ == "__main__":
    main()
