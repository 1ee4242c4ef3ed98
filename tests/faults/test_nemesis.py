"""Random faults on the whole service while jobs run: none is lost, none runs twice, all end once (G1, G2).

`FAULTS_SEED=n` makes other choices, the same each time; what they meet is up to the machine.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import pytest
import redis
from kombu.exceptions import OperationalError
from sqlalchemy import func, select

from db.models import Job
from db.session import Database
from db.states import JOB_TERMINAL
from db.work_models import DeviceLease
from tests.faults import parts
from tests.faults.history import Op, check, read_witness
from tests.faults.injections import frozen, kill
from tests.stack import FAST, Stack, wait_for

SHORT = {
    "max_steps": 20,
    "batch_size": 4,
    "max_length": 128,
    "save_steps": 5,
    "logging_steps": 1,
}
LONGER_THAN_A_LEASE_S = float(FAST["RESIDENCY_LEASE_TTL_S"]) + 2
EVERY_S = (1.0, 8.0)


def wipe(url: str) -> None:
    """Lose every message."""
    with redis.Redis.from_url(url.replace("redis+socket:", "unix:")) as client:
        with suppress(redis.RedisError):  # it may have been killed a moment ago
            client.flushall()


def storm(url: str) -> None:
    with suppress(OperationalError):  # likewise
        for queue in ("train", "cpu"):
            parts.ring(url, queue, times=30)


def freeze_some(processes: list[psutil.Process]) -> None:
    with frozen(processes):
        time.sleep(LONGER_THAN_A_LEASE_S)  # the fault itself


class Nemesis:
    """Breaks something every few seconds, as its seed says."""

    def __init__(self, stack: Stack, seed: int) -> None:
        self._choice = random.Random(seed)
        url = parts.environment(stack)["RESIDENCY_REDIS_URL"]
        self._faults: dict[str, Callable[[], None]] = {
            **{
                f"kill {name}": self._killer(lambda name=name: parts.part(stack, name))
                for name in parts.PARTS
            },
            "kill a supervisor": self._killer(lambda: parts.pool(stack, "train")),
            "kill a child of the second worker": self._killer(lambda: parts.pool(stack, "cpu")),
            "kill torchrun": self._killer(
                lambda: [p for p in parts.attempts(stack, "train") if parts.is_agent(p)]
            ),
            "kill a rank": self._killer(
                lambda: [p for p in parts.attempts(stack, "train") if not parts.is_agent(p)]
            ),
            "kill a merge": self._killer(lambda: parts.attempts(stack, "merge")),
            "freeze the supervisors": lambda: freeze_some(parts.pool(stack, "train")),
            "freeze the trainers": lambda: freeze_some(parts.attempts(stack, "train")),
            "wipe redis": lambda: wipe(url),
            "ring thirty times": lambda: storm(url),
        }

    def rage(self, *, until: threading.Event) -> None:
        t0 = time.monotonic()
        while not until.wait(self._choice.uniform(*EVERY_S)):
            name = self._choice.choice(sorted(self._faults))
            print(f"{time.monotonic() - t0:6.1f} s  {name}")  # noqa: T201 (pytest shows it when a test fails)
            self._faults[name]()

    def _killer(self, find: Callable[[], list[psutil.Process]]) -> Callable[[], None]:
        def fault() -> None:
            number = self._choice.random()  # drawn whether or not there is anybody
            found = sorted(find(), key=lambda process: process.pid)
            if found:
                kill([found[int(number * len(found))]])

        return fault


class Client:
    """Submits jobs, asks again until it is answered, cancels some; notes all that it was told."""

    def __init__(self, stack: Stack, file_id: str) -> None:
        self._http, self._file_id = stack.http(), file_id
        self._http.timeout = 10.0
        self.ops: list[Op] = []

    def submit(self, key: str) -> str:
        """The id of the job, once some answer names it."""
        method = {"type": "supervised", "supervised": {"hyperparameters": SHORT}}
        body = {"model": "tiny", "training_file": self._file_id, "metadata": {"key": key}, "method": method}
        while (op := self._ask("create", key, "/fine_tuning/jobs", json=body)).result == "maybe":
            time.sleep(1.0)  # as clients do
        assert op.result == "yes", key
        return str(op.id)

    def cancel(self, key: str, job_id: str) -> None:
        """Ask once; whether it comes in time is open."""
        self._ask("cancel", key, f"/fine_tuning/jobs/{job_id}/cancel")

    def _ask(self, op: Literal["create", "cancel"], key: str, path: str, **body: Any) -> Op:
        t0, result, job_id = time.time(), "maybe", None
        with suppress(httpx.TransportError):
            answer = self._http.post(path, headers={"Idempotency-Key": f"{op}-{key}"}, **body)
            if answer.status_code < 500:
                result, job_id = ("yes", answer.json()["id"]) if answer.is_success else ("no", None)
            else:
                assert answer.status_code in (502, 503), answer.text
        self.ops.append(Op(op, key, t0, time.time(), result, job_id))
        return self.ops[-1]


def work(client: Client, *, n_jobs: int, rage_s: float, seed: int, over: threading.Event) -> None:
    """Submit the jobs spread over the time, and cancel every fifth or so somewhere on its way."""
    choice = random.Random(seed + 1)
    for number in range(n_jobs):
        job_id = client.submit(f"{seed}-{number}")
        over.wait(choice.uniform(0, 2 * rage_s / n_jobs))
        if choice.random() < 0.2:
            client.cancel(f"{seed}-{number}", job_id)


def unfinished(database: Database) -> int:
    """Jobs without an end, and devices that nobody has given back."""
    with database.read() as session:
        jobs = select(func.count()).select_from(Job).where(Job.status.not_in(JOB_TERMINAL))
        held = select(func.count()).select_from(DeviceLease).where(DeviceLease.released_at.is_(None))
        return session.scalars(jobs).one() + session.scalars(held).one()


def rage_over(stack: Stack, chat_file: Path, *, seed: int, n_jobs: int, rage_s: float) -> str:
    """Let the nemesis rage while clients work, wait for the end of it all, judge; the tally in words."""
    with chat_file.open("rb") as source:
        file = stack.sdk().files.create(file=source, purpose="fine-tune")
    stack.sdk().files.wait_for_processing(file.id, poll_interval=0.2)
    database = Database(stack.database_url)
    others = {job.id for job in read_witness(database, stack.home / "runs").jobs}
    over = threading.Event()
    client, nemesis = Client(stack, file.id), Nemesis(stack, seed)
    with ThreadPoolExecutor() as pool:
        raging = pool.submit(nemesis.rage, until=over)
        working = pool.submit(work, client, n_jobs=n_jobs, rage_s=rage_s, seed=seed, over=over)
        over.wait(rage_s)
        over.set()
        raging.result()
        working.result()
    wait_for(
        lambda: unfinished(database) == 0, within_s=300 + 60 * n_jobs, what="every job to end", every_s=1
    )
    wait_for(
        lambda: not (parts.attempts(stack, "train") + parts.attempts(stack, "merge")),
        within_s=15,
        what="no orphan",
    )
    witness = read_witness(database, stack.home / "runs").without(others)
    database.dispose()
    assert check(client.ops, witness) == []
    ends = Counter(job.status for job in witness.jobs)
    return f"seed {seed}: {len(client.ops)} requests, {dict(ends)}, {len(witness.attempts)} attempts"


@parts.on_both(long=True)
@pytest.mark.faults(g=1)
@pytest.mark.timeout(4 * 3600)
def test_g01_nothing_is_lost_or_run_twice_while_a_nemesis_rages(stack: Stack, chat_file: Path) -> None:
    n_jobs, rage_s = (60, 1800.0) if parts.IN_FULL else (2, 30.0)
    print(rage_over(stack, chat_file, seed=parts.SEED, n_jobs=n_jobs, rage_s=rage_s))  # noqa: T201
