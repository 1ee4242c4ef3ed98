"""A Redis that is killed and wiped, and a PostgreSQL that crashes, touch no run (G11, G12)."""

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pgserver
import psutil
import pytest

from db.session import Database
from tests.deploy.compose_stack import ComposeStack, compose_stack
from tests.faults import meters, parts
from tests.faults.history import Witness
from tests.faults.injections import Proxy, frozen, is_gone, slow_down
from tests.stack import FAST, Stack, processes_of, start_stack, wait_for
from tests.workers.test_real_servers import free_port, running_redis
from tests.workers.test_recovery import job_of, submit, wait_for_checkpoint, wait_for_end

pytestmark = [pytest.mark.timeout(4 * 3600)]
LEASE_TTL_S = 12.0  # of which a PostgreSQL that comes back may take a few seconds


class Broker:
    """A Redis of our own on one port, and the wire to it, which is cut while it is away."""

    def __init__(self) -> None:
        self._port, self._life = free_port(), ExitStack()
        self.wire = Proxy(("127.0.0.1", self._port))

    def start(self) -> None:
        """A new one, which knows nothing."""
        folder = Path(self._life.enter_context(tempfile.TemporaryDirectory()))
        self._life.enter_context(running_redis(self._port, folder))
        self.wire.turn("open")

    def kill(self) -> None:
        """SIGKILL it, and forget what it wrote."""
        self._life.close()
        self.wire.turn("cut")


@dataclass
class OwnServers:
    """PostgreSQL and Redis of this module, under `residency up`. What is broken is whole again afterwards."""

    postgres: pgserver.PostgresServer
    postgres_wire: Proxy
    broker: Broker

    @contextmanager
    def broker_lost(self) -> Iterator[None]:
        """Redis is killed, and another one, which is empty, takes its place."""
        self.broker.kill()
        yield
        self.broker.start()

    @contextmanager
    def database_away(self) -> Iterator[None]:
        """PostgreSQL cannot be reached."""
        self.postgres_wire.turn("cut")
        yield
        self.postgres_wire.turn("open")

    @contextmanager
    def database_crashed(self) -> Iterator[None]:
        """PostgreSQL's word for a crash is SIGQUIT: nothing is flushed, all is recovered."""
        server = psutil.Process(self.postgres.get_postmaster_info().pid)
        server.send_signal(signal.SIGQUIT)
        wait_for(lambda: is_gone(server), within_s=20, what="the crash")
        yield
        self.postgres.ensure_postgres_running()


@dataclass
class ServersOfTheFile:
    """The same for those of docker-compose.yml."""

    stack: ComposeStack

    @contextmanager
    def broker_lost(self) -> Iterator[None]:
        with self.stack.down("redis", signal.SIGKILL):
            shutil.rmtree(self.stack.volume("redis"))
            self.stack.volume("redis")
            yield

    def database_away(self) -> AbstractContextManager[None]:
        return self.stack.down("postgres", signal.SIGINT)

    def database_crashed(self) -> AbstractContextManager[None]:
        return self.stack.down("postgres", signal.SIGQUIT)


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


@pytest.fixture(scope="module", params=["up"])
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Stack]:
    if request.param == "compose":
        request.getfixturevalue("postgres_url")  # as for the stack of the other modules
        with compose_stack(tiny_model, FAST | {"RESIDENCY_LEASE_TTL_S": str(LEASE_TTL_S)}) as stack:
            yield stack
        return
    postgres_wire, broker = map(request.getfixturevalue, ("postgres_wire", "broker"))
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
def servers(request: pytest.FixtureRequest, stack: Stack) -> OwnServers | ServersOfTheFile:
    if isinstance(stack, ComposeStack):
        return ServersOfTheFile(stack)
    return OwnServers(*map(request.getfixturevalue, ("postgres", "postgres_wire", "broker")))


@parts.on_both(long=True)
@pytest.mark.faults(g=11)
def test_g11_redis_is_killed_and_wiped(
    stack: Stack, servers: OwnServers, chat_file: Path, judge: Callable[..., Witness]
) -> None:
    n_queued = 60 if parts.IN_FULL else 1
    job_ids = [submit(stack, chat_file, max_steps=10, save_steps=5) for _ in range(n_queued)]
    wait_for(lambda: job_of(stack, job_ids[0])["status"] == "running", within_s=200, what="the first to run")

    assert meters.read(stack, "broker_up") == 1
    with servers.broker_lost():
        job_ids.append(submit(stack, chat_file, max_steps=10, save_steps=5))  # accepted all the same
        meters.wait_until_shown(stack, "broker_up", 0)
        assert parts.attempts(stack, "train"), "the run goes on"
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


@parts.on_both(long=True)
@pytest.mark.faults(g=12)
def test_g12_postgresql_crashes_and_comes_back(
    stack: Stack,
    stack_database: Database,
    servers: OwnServers,
    chat_file: Path,
    judge: Callable[..., Witness],
) -> None:
    down_s = 60.0 if parts.IN_FULL else 1.2 * LEASE_TTL_S
    job_id = submit(stack, chat_file, save_steps=3, logging_steps=1)
    wait_for_checkpoint(stack, job_id)
    trainers = parts.attempts(stack, "train", job_id, 1)
    slow_down(trainers)

    with servers.database_away():  # for less than a lease
        assert_unavailable(stack, for_s=3)
    print(f"after a cut: {back_after_s(stack):.1f} s")  # noqa: T201 (for README)

    stack_database.dispose()
    with ExitStack() as crash:
        crash.enter_context(servers.database_crashed())
        assert_unavailable(stack, for_s=down_s)
        meters.wait_until_shown(stack, "database_up", 0)
        step = job_step(stack.home, job_id)
        wait_for(lambda: job_step(stack.home, job_id) > step, within_s=60, what="a step without a database")
        with frozen(parts.pool(stack, "train")):  # others are the first to see a lease that is long over
            crash.close()
            took_s = back_after_s(stack)
            came_back_at = last_seen_at(stack)
            wait_for(
                lambda: last_seen_at(stack) >= came_back_at + 2, within_s=60, what="others to look around"
            )
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
    """When a worker last began to look around: for lost leases, then for work."""
    with stack.http() as client:
        return max(node["last_seen_at"] for node in client.get("/nodes").json()["data"])


def job_step(home: Path, job_id: str) -> int:
    """How many lines the first attempt has told so far: it speaks at every step."""
    return (home / "runs" / job_id / "1" / "events.jsonl").read_bytes().count(b"\n")
