"""Each worker hears every tick: beside others, after Redis' death, and never more than it can take."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import redis
from celery.utils.nodenames import worker_direct

from db import nodes
from db.session import Database
from tests.faults.injections import Proxy, frozen
from tests.stack import FAST, users_shell, wait_for
from tests.workers.test_real_servers import free_port, running_redis

TICK_S = 0.5
Start = Callable[[str], subprocess.Popen[bytes]]
Serving = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def redis_port() -> int:
    return free_port()


@pytest.fixture
def serving(redis_port: int) -> Serving:
    """A Redis that knows nothing, for as long as it is entered."""

    @contextmanager
    def serving() -> Iterator[None]:
        with TemporaryDirectory() as folder, running_redis(redis_port, Path(folder)):
            yield

    return serving


@pytest.fixture
def wire(redis_port: int) -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", redis_port)) as wire:
        yield wire


@pytest.fixture
def start(tmp_path: Path, sqlite_database: Database, wire: Proxy) -> Iterator[Start]:
    """Starts a training worker of a node: no beat and no API beside it."""
    env = users_shell() | FAST
    env |= {
        "RESIDENCY_HOME": str(tmp_path),
        "RESIDENCY_DATABASE_URL": sqlite_database.url,
        "RESIDENCY_REDIS_URL": f"redis://127.0.0.1:{wire.port}/0",
        "RESIDENCY_TICK_S": str(TICK_S),
    }
    argv = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", "train", "-c", "1"]
    argv += ["--without-gossip", "--without-mingle", "-n"]
    with ExitStack() as life:

        def start(node: str) -> subprocess.Popen[bytes]:
            worker = subprocess.Popen([*argv, f"train@{node}"], env=env | {"RESIDENCY_NODE": node})
            life.callback(end, worker)
            return worker

        yield start


def end(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    worker.wait(timeout=60)


def heard(database: Database) -> dict[str, float]:
    """When each node last looked around."""
    with database.read() as session:
        return {node.name: node.last_seen_at for node in nodes.list_all(session)}


def wait_until_heard(database: Database, *names: str, times: int) -> None:
    """Until each of the nodes has looked around so many times more."""
    seen: dict[str, set[float]] = {name: set() for name in names}

    def often() -> bool:
        for name, at in heard(database).items():
            seen[name].add(at)
        return all(len(each) > times for each in seen.values())

    wait_for(often, within_s=TICK_S * times * 2 + 30, what=f"a word of each: {seen}")


def test_each_of_several_workers_hears_every_tick(
    start: Start, serving: Serving, sqlite_database: Database
) -> None:
    names = ("a", "b")
    with serving():
        for name in names:
            start(name)
        wait_until_heard(sqlite_database, *names, times=1)
        before, since = heard(sqlite_database), time.monotonic()
        wait_until_heard(sqlite_database, *names, times=5)
        assert time.monotonic() - since < 20, (before, heard(sqlite_database))


@pytest.mark.long
def test_it_goes_on_when_another_redis_takes_the_place_of_one_that_died(
    start: Start, serving: Serving, sqlite_database: Database
) -> None:
    with serving():
        start("a")
        wait_until_heard(sqlite_database, "a", times=2)
    with serving():
        wait_until_heard(sqlite_database, "a", times=2)


@pytest.mark.long
def test_no_rings_pile_up_before_a_worker_that_works(
    start: Start, serving: Serving, sqlite_database: Database, redis_port: int
) -> None:
    with serving(), redis.Redis(port=redis_port) as broker:
        worker = start("a")
        wait_until_heard(sqlite_database, "a", times=1)
        with frozen(psutil.Process(worker.pid).children()):
            t0 = time.monotonic()
            last = heard(sqlite_database)
            wait_for(lambda: time.monotonic() - t0 > 10 * TICK_S, within_s=30, what="ten ticks")
            assert heard(sqlite_database) == last, "it stands still"
            assert broker.llen(worker_direct("train@a").name) <= 1
        wait_until_heard(sqlite_database, "a", times=2)


def test_a_ring_does_not_wait_for_a_redis_that_is_silent(serving: Serving, wire: Proxy) -> None:
    ring = "from workers import dispatch; dispatch.ring('train')"
    env = users_shell() | {"RESIDENCY_REDIS_URL": f"redis://127.0.0.1:{wire.port}/0"}
    with serving():
        wire.turn("held")
        rung = subprocess.run(
            [sys.executable, "-c", ring], env=env, capture_output=True, text=True, timeout=30
        )
    assert rung.returncode == 0, rung.stderr
    assert "the broker cannot be reached" in rung.stderr
