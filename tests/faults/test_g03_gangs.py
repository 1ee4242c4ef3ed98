"""A job on two hosts: whatever happens to one, both stop, and it goes on as one from the checkpoint (G3)."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pgserver
import pytest
from sqlalchemy import select

from db.session import Database
from db.work_models import Attempt, Task
from tests.faults import parts
from tests.faults.history import Witness
from tests.faults.hosts import Host, Network, may_make_namespaces
from tests.faults.injections import Proxy, is_gone
from tests.faults.test_g11_g12_servers import postgres  # noqa: F401 (a fixture)
from tests.stack import Stack, processes_of, start_stack, wait_for
from tests.workers.test_real_servers import free_port, running_redis
from tests.workers.test_recovery import (
    RESUMED,
    messages_of,
    submit,
    wait_for_checkpoint,
    wait_for_end,
    wait_for_message,
)

pytestmark = [pytest.mark.faults(g=3), pytest.mark.timeout(3600)]
KIND = "namespaces" if may_make_namespaces() else "one-address"


@pytest.fixture(scope="module", params=[KIND])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    with Network(namespaces=request.param == "namespaces") as network:
        yield network


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory,
    postgres: pgserver.PostgresServer,  # noqa: F811
) -> Iterator[list[tuple[str, int] | Path]]:
    """Where this machine reaches PostgreSQL and Redis."""
    info, port = postgres.get_postmaster_info(), free_port()
    with running_redis(port, tmp_path_factory.mktemp("redis")):
        yield [Path(info.socket_dir) / f".s.PGSQL.{info.port}", ("127.0.0.1", port)]


def wire_up(life: ExitStack, network: Network, servers: list[tuple[str, int] | Path]) -> list[Proxy]:
    """Wires to the servers that can be held."""
    return [life.enter_context(Proxy(server, address=network.address)) for server in servers]


def urls(network: Network, wires: list[Proxy]) -> dict[str, str]:
    database, redis = wires
    return {
        "RESIDENCY_DATABASE_URL": f"postgresql://postgres@{network.address}:{database.port}/postgres",
        "RESIDENCY_REDIS_URL": f"redis://{network.address}:{redis.port}/0",
    }


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    network: Network,
    servers: list[tuple[str, int] | Path],
) -> Iterator[Stack]:
    """All but the hosts. Its own node has a GPU in name only, which nothing joins with their slots."""
    with ExitStack() as life:
        home = tmp_path_factory.mktemp("gangs") / "home"
        env = urls(network, wire_up(life, network, servers))
        stack = start_stack(home, import_dirs=[tiny_model], RESIDENCY_GPUS="0", **env)
        stack.import_model(tiny_model, model_id="tiny")
        yield stack
        assert stack.stop() == 0
        assert processes_of(home) == []


@pytest.fixture(scope="module")
def hosts(stack: Stack, network: Network, servers: list[tuple[str, int] | Path]) -> Iterator[dict[str, Host]]:
    with ExitStack() as life:
        started = {}
        for name in ("host-a", "host-b"):
            wires = wire_up(life, network, servers)
            env, log = parts.environment(stack) | urls(network, wires), stack.home / "logs" / f"{name}.log"
            started[name] = life.enter_context(Host(name, network, env, log, wires))
        wait_for(lambda: started.keys() <= node_holders(stack).keys(), within_s=120, what="both hosts")
        yield started


class Gang:
    """A job that trains on both hosts and has a checkpoint."""

    def __init__(
        self, stack: Stack, database: Database, hosts: dict[str, Host], judge: Callable[..., Witness]
    ) -> None:
        self.stack, self._database, self._hosts, self._judge = stack, database, hosts, judge

    def start(self, chat_file: Path) -> None:
        self.job_id = submit(self.stack, chat_file, nodes=2)
        wait_for_checkpoint(self.stack, self.job_id)
        holders = node_holders(self.stack)
        assert [holders[name] for name in self._hosts] == [[self.job_id]] * 2
        leading = self._select(Attempt.node)
        self.leader = self._hosts[leading]
        (self.member,) = (host for host in self._hosts.values() if host.name != leading)
        self.trainers = parts.attempts(self.stack, "train", self.job_id, 1)
        self.ranks = {host.name: self._ranks_on(host) for host in (self.leader, self.member)}

    def wait_until_stopped(self, *, but_for: Host | None = None) -> None:
        """Until nothing of the first attempt lives, on hosts that can be told."""
        left = [p for p in self.trainers if but_for is None or p not in but_for.processes()]
        assert left
        wait_for(lambda: all(map(is_gone, left)), within_s=60, what="both trees to end")
        waits = re.compile(r".*; the job waits for another attempt")
        wait_for(
            lambda: any(map(waits.fullmatch, messages_of(self.stack, self.job_id))),
            within_s=60,
            what="the job to wait",
        )

    def goes_on(self, *, charged: int) -> None:
        """The second attempt resumes with none of the first beside it; the history is without a fault."""
        wait_for_message(self.stack, self.job_id, "Fine-tuning job goes on (attempt 2)")
        assert not parts.attempts(self.stack, "train", self.job_id, 1), "two attempts at once"
        wait_for_message(self.stack, self.job_id, RESUMED)
        assert self._select(Task.charged) == charged
        self.stack.sdk().fine_tuning.jobs.cancel(self.job_id)
        assert wait_for_end(self.stack, self.job_id)["status"] == "cancelled"
        (job,) = self._judge(self.job_id).jobs
        (step,) = (int(m.split()[-1]) for m, _ in job.events if m.startswith(RESUMED))
        assert 0 < step <= max(job.saved)

    def _select(self, column):
        with self._database.read() as session:
            of_job = (Task.subject_id == self.job_id, Task.kind == "train")
            return session.scalars(select(column).select_from(Attempt).join(Task).where(*of_job)).first()

    def _ranks_on(self, host: Host) -> list[str]:
        ranks = [p for p in host.processes() if p in self.trainers and not parts.is_agent(p)]
        return [p.environ()["RANK"] for p in ranks if "RANK" in p.environ()]


@pytest.fixture
def gang(
    stack: Stack,
    stack_database: Database,
    hosts: dict[str, Host],
    judge: Callable[..., Witness],
    chat_file: Path,
) -> Gang:
    gang = Gang(stack, stack_database, hosts, judge)
    gang.start(chat_file)
    return gang


def node_holders(stack: Stack) -> dict[str, list[str | None]]:
    """Who holds the devices of each node."""
    with stack.http() as client:
        nodes = client.get("/nodes").json()["data"]
    return {node["name"]: [device["held_by"] for device in node["devices"]] for node in nodes}


@pytest.mark.long
def test_a_killed_host_ends_the_gang_on_both_and_it_goes_on_from_the_checkpoint(gang: Gang) -> None:
    assert sorted(gang.ranks.values()) == [["0"], ["1"]]
    gang.member.kill()
    gang.wait_until_stopped()
    gang.member.start()
    gang.goes_on(charged=2)


def test_the_loss_of_the_leader_is_the_end_of_the_gang_and_not_of_the_job(gang: Gang) -> None:
    gang.leader.kill()
    gang.wait_until_stopped()
    gang.leader.start()
    gang.goes_on(charged=2)


def test_a_cut_cable_runs_nothing_twice(gang: Gang) -> None:
    gang.member.cut()
    gang.wait_until_stopped(but_for=gang.member)
    assert gang.member.processes(), "the other host runs on"
    gang.member.join()
    gang.goes_on(charged=2)


def test_a_drained_host_saves_for_both_and_costs_no_attempt(gang: Gang) -> None:
    gang.member.stop()
    gang.wait_until_stopped()
    gang.member.start()
    gang.goes_on(charged=1)
