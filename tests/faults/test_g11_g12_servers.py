"""A Redis that is killed and wiped, and a PostgreSQL that crashes, touch no run (G11, G12)."""

import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pgserver
import psutil
import pytest

from db.session import Database
from tests.faults import meters, parts
from tests.faults.history import Witness
from tests.faults.injections import Proxy, frozen, is_gone
from tests.stack import Stack, processes_of, start_stack, wait_for
from tests.workers.test_real_servers import free_port, running_redis
from tests.workers.test_recovery import job_of, submit, wait_for_checkpoint, wait_for_end

pytestmark = [pytest.mark.timeout(4 * 3600)]
LEASE_TTL_S = 12.0  # of which a PostgreSQL that comes back may take a few seconds


class Broker:
    """A Redis of our own on one port, and the wire to it."""

    def __init__(self) -> None:
        self._port, self._life = free_port(), ExitStack()
        self.wire = Proxy(("127.0.0.1", self._port))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """A new one, which knows nothing."""
        folder = Path(self._life.enter_context(tempfile.TemporaryDirectory()))
        self.process = self._life.enter_context(running_redis(self._port, folder))

    def kill(self) -> None:
        """SIGKILL it, and forget what it wrote."""
        self._life.close()


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    broker = Broker()
    with broker.wire:
        broker.start()
        yield broker
        broker.kill()


@pytest.fixture(scope="module")
def postgres() -> Iterator[pgserver.PostgresServer]:
    with tempfile.TemporaryDirectory(prefix="residency-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        yield server
        server.cleanup()


@pytest.fixture(scope="module")
def postgres_wire(postgres: pgserver.PostgresServer) -> Iterator[Proxy]:
    info = postgres.get_postmaster_info()
    with Proxy(Path(info.socket_dir) / f".s.PGSQL.{info.port}") as wire:
        yield wire


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, postgres_wire: Proxy, broker: Broker
) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("servers") / "home"
    stack = start_stack(
        home,
        import_dirs=[tiny_model],
        RESIDENCY_DATABASE_URL=f"postgresql://postgres@127.0.0.1:{postgres_wire.port}/postgres",
        RESIDENCY_REDIS_URL=f"redis://127.0.0.1:{broker.wire.port}/0",
        RESIDENCY_LEASE_TTL_S=str(LEASE_TTL_S),
    )
    stack.import_model(tiny_model, model_id="tiny")
    yield stack
    assert stack.stop() == 0
    assert processes_of(home) == []


@pytest.fixture
def stack_database(stack: Stack) -> Iterator[Database]:
    database = Database(parts.environment(stack)["RESIDENCY_DATABASE_URL"])
    yield database
    database.dispose()


@pytest.mark.long
@pytest.mark.faults(g=11)
def test_g11_redis_is_killed_and_wiped(
    stack: Stack, broker: Broker, chat_file: Path, judge: Callable[..., Witness]
) -> None:
    n_queued = 60 if parts.IN_FULL else 2
    job_ids = [submit(stack, chat_file, max_steps=10, save_steps=5) for _ in range(n_queued)]
    wait_for(lambda: job_of(stack, job_ids[0])["status"] == "running", within_s=200, what="the first to run")

    assert meters.read(stack, "broker_up") == 1
    broker.kill()
    job_ids.append(submit(stack, chat_file, max_steps=10, save_steps=5))  # accepted all the same
    meters.wait_until_shown(stack, "broker_up", 0)
    broker.wire.turn("cut")
    running = parts.attempts(stack, "train")
    assert running, "the run goes on"
    broker.start()
    broker.wire.turn("open")
    t0 = time.monotonic()

    wait_for(
        lambda: all(status_of(stack, job_id) == "processed" for job_id in job_ids[-1:]),
        within_s=45,
        what="work to flow again",
    )
    print(f"work flows after {time.monotonic() - t0:.1f} s")  # noqa: T201 (for README)
    meters.wait_until_shown(stack, "broker_up", 1)
    for job_id in job_ids:
        ended = wait_for_end(stack, job_id)
        assert ended["status"] == "succeeded", ended["error"]
    assert {held.token for held in judge(*job_ids).attempts} == {1}, "each once"


def status_of(stack: Stack, job_id: str) -> str:
    """Where the check of a job's file is."""
    return stack.sdk().files.retrieve(job_of(stack, job_id)["training_file"]).status


@pytest.mark.long
@pytest.mark.faults(g=12)
def test_g12_postgresql_crashes_and_comes_back(
    stack: Stack,
    stack_database: Database,
    postgres: pgserver.PostgresServer,
    postgres_wire: Proxy,
    chat_file: Path,
    judge: Callable[..., Witness],
) -> None:
    down_s = 60.0 if parts.IN_FULL else 1.2 * LEASE_TTL_S
    job_id = submit(stack, chat_file, save_steps=3, logging_steps=1)
    wait_for_checkpoint(stack, job_id)
    trainers = parts.attempts(stack, "train", job_id, 1)

    postgres_wire.turn("cut")  # for less than a lease
    assert_unavailable(stack, for_s=3)
    postgres_wire.turn("open")
    print(f"after a cut: {back_after_s(stack):.1f} s")  # noqa: T201 (for README)

    stack_database.dispose()
    server = psutil.Process(postgres.get_postmaster_info().pid)
    server.send_signal(signal.SIGQUIT)  # PostgreSQL's word for a crash: nothing is flushed, all is recovered
    wait_for(lambda: is_gone(server), within_s=20, what="the crash")
    assert_unavailable(stack, for_s=down_s)
    meters.wait_until_shown(stack, "database_up", 0)
    step = job_step(stack.home, job_id)
    wait_for(lambda: job_step(stack.home, job_id) > step, within_s=60, what="a step without a database")
    with frozen(parts.pool(stack, "train")):  # so that others are the first to see a lease that is long over
        postgres.ensure_postgres_running()
        took_s = back_after_s(stack)
        came_back_at = last_seen_at(stack)
        wait_for(lambda: last_seen_at(stack) >= came_back_at + 2, within_s=60, what="others to look around")
    print(f"after a crash: {took_s:.1f} s")  # noqa: T201 (for README)
    assert took_s <= 10
    meters.wait_until_shown(stack, "database_up", 1)

    wait_for(lambda: job_of(stack, job_id)["progress"]["step"] > step, within_s=60, what="news of the run")
    assert all(process.is_running() for process in trainers), "the very same processes"
    stack.sdk().fine_tuning.jobs.cancel(job_id)
    assert wait_for_end(stack, job_id)["status"] == "cancelled"
    assert [held.token for held in judge(job_id).attempts] == [1], "no attempt was charged"


def assert_unavailable(stack: Stack, *, for_s: float) -> None:
    """Every request is told to come again; none is answered with a fault."""
    until = time.monotonic() + for_s
    with stack.http() as client:
        while time.monotonic() < until:
            for answer in (client.get("/fine_tuning/jobs"), client.post("/fine_tuning/jobs", json={})):
                assert answer.status_code == 503, answer.text
                assert int(answer.headers["retry-after"]) > 0


def back_after_s(stack: Stack) -> float:
    """How long until the API answers again."""
    t0 = time.monotonic()
    with stack.http() as client:
        wait_for(lambda: client.get("/fine_tuning/jobs").is_success, within_s=60, what="the API")
    return time.monotonic() - t0


def last_seen_at(stack: Stack) -> int:
    """When a worker of the only node last began to look around: for lost leases, then for work."""
    with stack.http() as client:
        return client.get("/nodes").json()["data"][0]["last_seen_at"]


def job_step(home: Path, job_id: str) -> int:
    """How many lines the first attempt has told so far: it speaks at every step."""
    return (home / "runs" / job_id / "1" / "events.jsonl").read_bytes().count(b"\n")
