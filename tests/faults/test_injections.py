"""The faults happen: what is cut is cut, what is held waits, what is full refuses, and all of it ends."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.faults import parts
from tests.faults.injections import Proxy, fill, frozen, kill, may_mount, small_disk
from tests.stack import Stack
from workers.processes import MARKER


@pytest.fixture(params=["tcp", "unix"])
def echo(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int] | Path]:
    """A server that says everything twice."""
    path = tmp_path / "echo"
    if request.param == "tcp":
        server = socket.create_server(("127.0.0.1", 0))
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.listen()

    def answer(peer: socket.socket) -> None:
        with peer, suppress(ConnectionError):
            while data := peer.recv(100):
                peer.sendall(data * 2)

    def accept() -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield path if request.param == "unix" else server.getsockname()
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def test_a_wire_is_cut_held_and_slow(echo):
    with Proxy(echo) as proxy, connect(proxy) as client:
        client.sendall(b"a")
        assert client.recv(9) == b"aa"

        proxy.turn("held")
        client.sendall(b"b")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(9)
        proxy.turn("open")
        client.settimeout(5)
        assert client.recv(9) == b"bb"

        proxy.delay_s = 0.2
        t0 = time.monotonic()
        client.sendall(b"c")
        assert client.recv(9) == b"cc"
        assert time.monotonic() - t0 >= 0.4
        proxy.delay_s = 0

        proxy.turn("cut")
        with pytest.raises(ConnectionError):
            assert client.recv(9) != b"", "closed in order, as if the server had wanted it"
        with pytest.raises(ConnectionError), connect(proxy) as late:
            assert late.recv(9) != b""
        proxy.turn("open")
        with connect(proxy) as again:
            again.sendall(b"d")
            assert again.recv(9) == b"dd"


def test_a_frozen_process_goes_on_and_a_killed_one_does_not():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process = psutil.Process(child.pid)
    with frozen([process]):
        os.waitpid(child.pid, os.WUNTRACED)
        assert process.status() == psutil.STATUS_STOPPED
    os.waitpid(child.pid, os.WCONTINUED)
    assert process.status() != psutil.STATUS_STOPPED
    kill([process])
    assert child.wait() == -9
    kill([process])  # once more is no error


@pytest.mark.skipif(not may_mount(), reason="this process may not mount")
def test_a_small_disk_is_full_until_the_ballast_goes(tmp_path: Path):
    with small_disk(tmp_path, 1 << 20):
        ballast = fill(tmp_path, leave_bytes=8192)
        with pytest.raises(OSError, match="No space left") as refused:
            (tmp_path / "a").write_bytes(b"x" * 100_000)
        assert refused.value.errno == errno.ENOSPC
        ballast.unlink()
        (tmp_path / "a").write_bytes(b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_is_told_from_the_rank_of_a_host(tmp_path: Path):
    second_on_second_host = {MARKER: "0123/train/ftjob-a/2/1"}
    with subprocess.Popen(["/bin/sleep", "600"], cwd=tmp_path, env=second_on_second_host) as child:
        stack = Stack(tmp_path, 0, child, "")
        found = [parts.attempts(stack, "train", "ftjob-a", token) for token in (None, 2, 1)]
        child.kill()
    assert [[process.pid for process in some] for some in found] == [[child.pid], [child.pid], []]
