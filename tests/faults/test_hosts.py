"""Hosts of both kinds die whole, fall silent when their cable is cut, and speak again."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pgserver
import pytest

from tests.faults.hosts import Host, Network, may_make_namespaces
from tests.faults.injections import Proxy
from tests.faults.test_g11_g12_servers import postgres  # noqa: F401 (a fixture)
from tests.stack import wait_for

KINDS = ["one-address", *(["namespaces"] if may_make_namespaces() else [])]
# A child in a session of its own, as torchrun's ranks are, sends without end.
PROGRAM = """
import socket, subprocess, sys, time
if sys.argv[3:]:
    sys.exit(subprocess.Popen([sys.executable, *sys.orig_argv[1:-1]], start_new_session=True).wait())
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as server:
    while True:
        server.sendall(b".")
        time.sleep(0.05)
"""
# Asks its database without end, until that is an error.
ASKER = """
import sys
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from db.session import Database
database = Database(sys.argv[1])
try:
    while True:
        with database.read() as session:
            print(session.scalar(select(1)), flush=True)
except OperationalError as error:
    print("lost:", error.orig, flush=True)
"""


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    with Network(namespaces=request.param == "namespaces") as network:
        yield network


def test_a_host_is_cut_off_joined_and_killed(network: Network, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Proxy(server.getsockname(), address=network.address) as wire,
    ):
        command = [sys.executable, "-c", PROGRAM, network.address, str(wire.port), "with-child"]
        host = Host("sender", network, dict(os.environ), tmp_path / "log", [wire], command)
        host.start()
        server.settimeout(30)
        link, _ = server.accept()
        link.settimeout(0.5)

        def hears() -> bool:
            try:
                return bool(link.recv(65536))
            except TimeoutError:
                return False

        wait_for(hears, within_s=10, what="a byte")
        host.cut()
        wait_for(lambda: not hears(), within_s=10, what="silence")
        assert len(host.processes()) == 2, "it runs on"
        host.join()
        wait_for(hears, within_s=30, what="a byte again")

        host.kill()

        link.settimeout(10)
        deadline = time.monotonic() + 10
        while link.recv(65536):
            assert time.monotonic() < deadline, "a process of the host still sends"
        link.close()


@pytest.mark.long
@pytest.mark.parametrize("network", KINDS[1:], indirect=True)
def test_a_silent_database_is_an_error_and_no_wait(
    network: Network,
    tmp_path: Path,
    postgres: pgserver.PostgresServer,  # noqa: F811
) -> None:
    """The kernel at the other end of a held wire would still answer: only a cable can be cut here."""
    info = postgres.get_postmaster_info()
    socket_file = Path(info.socket_dir) / f".s.PGSQL.{info.port}"
    with Proxy(socket_file, address=network.address) as wire:
        url = f"postgresql://postgres@{network.address}:{wire.port}/postgres"
        log = tmp_path / "log"
        command = [sys.executable, "-c", ASKER, url]
        with Host("asker", network, dict(os.environ), log, [wire], command) as host:
            wait_for(lambda: log.read_text().count("1") > 3, within_s=30, what="answers")
            host.cut()
            wait_for(lambda: "lost:" in log.read_text(), within_s=60, what="an error")
