"""A worker whose work breaks off unsettled lives on, and holds nothing."""

import json
import os
import subprocess
import sys

from db.tasks import Owner
from tests.db.world import World
from workers import leases, processes

ANSWER = """
import os
from db import logs
from workers import ring
logs.configure()
try:
    ring.answer("train")
except NotADirectoryError as error:
    print("broke", os.getpid(), error.filename, flush=True)
"""


def test_work_that_broke_is_given_back_by_its_worker(world: World):
    job = world.add_job()
    (world.home / "runs").write_text("no folder can be made here")
    env = os.environ | {
        "RESIDENCY_HOME": str(world.home),
        "RESIDENCY_DATABASE_URL": world.database.url,
        "RESIDENCY_GPUS": "none",
        "RESIDENCY_MIN_FREE_BYTES": "0",
    }
    worker = subprocess.run(
        [sys.executable, "-c", ANSWER], env=env, capture_output=True, text=True, timeout=60
    )

    assert worker.stdout.startswith("broke"), worker.stderr
    (attempt,) = world.attempts(job.id)
    [claimed] = [
        line for text in worker.stderr.splitlines() if (line := json.loads(text))["message"] == "claimed"
    ]
    assert (claimed["job_id"], claimed["attempt"], claimed["task"]) == (job.id, attempt.token, "train")
    assert str(attempt.owner_pid) == worker.stdout.split()[1]
    assert attempt.outcome == "lost"
    assert world.task(job.id).status == "queued"


def test_only_the_worker_that_asks_is_known_to_be_idle(world: World):
    job = world.add_job()
    pid, started_at = processes.identity()
    me = Owner(node="node-1", pid=pid, started_at=started_at)
    world.take(owner=me)

    leases.recover_node(world.database, "node-1")
    leases.recover_node(world.database, "node-1", idle=Owner(node="node-1", pid=pid, started_at=1.0))
    assert world.attempts(job.id)[0].ended_at is None, "a worker that lives may be at work"

    leases.recover_node(world.database, "node-1", idle=me)
    assert world.attempts(job.id)[0].outcome == "lost"
