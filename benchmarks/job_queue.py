"""Ten thousand queued jobs on PostgreSQL (G32): what a claim and a page of the list cost, and memory.

`python benchmarks/job_queue.py [--jobs 10000] [--tenants 1] [--claimers 8] [--out FILE]` starts a PostgreSQL
and an API of its own. Each claimer is a process and a node with one slot; it claims as a worker does (the
task, its lease and the start of the job in one transaction), and ends the job. First each of them holds its
jobs for a second on average, which is far less than any job takes; then, until the queue is empty, for no
time at all: all of them at once without a pause say what the machine can do, not what a worker waits for.
Pages of the list are read over HTTP before, while nothing is claimed.
"""

import argparse
import json
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import pgserver
import psutil
from sqlalchemy import func, select

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from db import claims, jobs, keys, tasks  # noqa: E402
from db.migrate import upgrade  # noqa: E402
from db.models import Job  # noqa: E402
from db.session import Database  # noqa: E402
from db.tasks import Owner  # noqa: E402
from db.work_models import Attempt  # noqa: E402
from tests.db.world import World  # noqa: E402
from tests.stack import wait_for  # noqa: E402

PER_TRANSACTION = 100  # jobs that are made together
PAGES = 1000
PACED = 1000  # jobs that are held for a while
HELD_S = 1.0  # on average
ENDED = {"code": "benchmark", "message": "Ended by the benchmark.", "param": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--tenants", type=int, default=1)
    parser.add_argument("--claimers", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="residency-queue-") as folder:
        server = pgserver.get_server(folder + "/postgres", cleanup_mode="stop")
        try:
            url = server.get_uri().replace("postgresql:", "postgresql+psycopg:")
            result = measure(
                Path(folder),
                url,
                n_jobs=options.jobs,
                n_tenants=options.tenants,
                n_claimers=options.claimers,
            )
        finally:
            server.cleanup()
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure(folder: Path, url: str, *, n_jobs: int, n_tenants: int, n_claimers: int) -> dict[str, Any]:
    """The whole benchmark on an empty database."""
    database = Database(url)
    upgrade(database)
    pepper = secrets.token_hex(32)
    with database.write() as session:
        org = keys.ensure_default_org(session)
        key = keys.create(session, org_id=org.id, name="benchmark", role="user", pepper=pepper)
    fill(World(database, folder), n_jobs=n_jobs, n_tenants=n_tenants)
    with serve(folder, url, pepper=pepper) as (port, api):
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}/v1",
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
        ) as http:
            first_bytes = api.memory_info().rss
            pages = read_pages(http)
            api_growth = api.memory_info().rss - first_bytes
    with ProcessPoolExecutor(n_claimers, mp_context=get_context("spawn")) as pool:
        list(pool.map(abs, range(n_claimers)))  # start them all
        names = [f"node-{n}" for n in range(n_claimers)]
        paced = list(pool.map(partial(claim_often, url, n_jobs=min(PACED, n_jobs // 2) // n_claimers), names))
        began = time.perf_counter()
        drained = list(pool.map(partial(claim_often, url, n_jobs=None), names))
        seconds = time.perf_counter() - began
    check(database, n_jobs=n_jobs)
    database.dispose()
    return {
        "benchmark": "job_queue",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]},
        "jobs": n_jobs,
        "tenants": n_tenants,
        "claimers": n_claimers,
        # Without the first of each, which opens a connection.
        "claim_ms": quantiles([claim for one in paced for claim in one["claims_s"][1:]]),
        "saturated": {
            "claim_ms": quantiles([claim for one in drained for claim in one["claims_s"]]),
            "jobs_per_s": sum(len(one["claims_s"]) for one in drained) / seconds,
        },
        "list_ms": quantiles(pages),
        "memory_growth_bytes": {
            "api": api_growth,
            "claimer": max(one["growth_bytes"] for one in drained),
        },
    }


def fill(world: World, *, n_jobs: int, n_tenants: int) -> None:
    """Queue the jobs of the tenants, those of each on one checked file."""
    world.add_model()
    tenants = [world, *(world.other(f"tenant-{number}") for number in range(1, n_tenants))]
    new = [(tenant, tenant.new_job(tenant.add_file())) for tenant in tenants]
    for start in range(0, n_jobs, PER_TRANSACTION):
        with world.database.write() as session:
            for number in range(start, min(start + PER_TRANSACTION, n_jobs)):
                tenant, job = new[number % n_tenants]
                jobs.create(session, job, org_id=tenant.org_id)


@contextmanager
def serve(folder: Path, url: str, *, pepper: str) -> Iterator[tuple[int, psutil.Process]]:
    """An API on the database: its port and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "api.server", "--port", str(port)]
    own = {"RESIDENCY_HOME": str(folder), "RESIDENCY_DATABASE_URL": url, "RESIDENCY_KEY_PEPPER": pepper}
    process = subprocess.Popen(argv, env=os.environ | own, cwd=ROOT)
    try:
        wait_for(lambda: answers(port), within_s=60, what="the API")
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(port: int) -> bool:
    """Whether the API is up; without Redis it is not ready, but it lists."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def read_pages(http: httpx.Client) -> list[float]:
    """Seconds of each page of the list, read on and on from the newest to the oldest job."""
    seconds: list[float] = []
    after: str | None = None
    while len(seconds) < PAGES:
        query = {"limit": "20"} | ({"after": after} if after else {})
        began = time.perf_counter()
        page = http.get("/fine_tuning/jobs", params=query)
        seconds.append(time.perf_counter() - began)
        assert page.status_code == 200, page.text
        found = page.json()
        after = found["data"][-1]["id"] if found["has_more"] else None
    return seconds


def claim_often(url: str, node: str, *, n_jobs: int | None) -> dict[str, Any]:
    """Claim and end so many jobs, holding each for a while, or all that wait and at once.

    The seconds of each claim, and what the process grew by.
    """
    database = Database(url)
    owner = Owner(node=node, pid=os.getpid(), started_at=time.time())
    chance = random.Random(node)  # noqa: S311
    seconds: list[float] = []
    early_bytes = 0
    while n_jobs is None or len(seconds) < n_jobs:
        began = time.perf_counter()
        with database.write() as session:
            lease = claims.claim(
                session, queue="train", owner=owner, devices=["slot:0"], shared_slot=True, ttl_s=60.0
            )
            if lease is not None:
                jobs.start(session, lease, resolved={"n_epochs": 1})
        took_s = time.perf_counter() - began
        if lease is None:
            with database.read() as session:
                if not tasks.waiting(session, "train"):
                    break
            continue  # others took all that this one had looked at
        seconds.append(took_s)
        if len(seconds) == 100:
            early_bytes = psutil.Process().memory_info().rss
        if n_jobs is not None:
            time.sleep(chance.expovariate(1 / HELD_S))
        with tasks.fenced(database, lease) as session:
            jobs.fail(session, lease, error=ENDED)
    growth_bytes = psutil.Process().memory_info().rss - early_bytes if early_bytes else 0
    database.dispose()
    return {"claims_s": seconds, "growth_bytes": growth_bytes}


def check(database: Database, *, n_jobs: int) -> None:
    """Every job was claimed once, and is over."""
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Attempt)) == n_jobs
        assert session.scalar(select(func.count()).where(Job.status == "failed")) == n_jobs


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {
        "n": len(seconds),
        "p50": round(cuts[49] * 1000, 2),
        "p95": round(cuts[94] * 1000, 2),
        "p99": round(cuts[98] * 1000, 2),
        "max": round(max(seconds) * 1000, 2),
    }


if __name__ == "__main__":
    main()
