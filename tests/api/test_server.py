"""A server that is told to stop answers every connection that the kernel took for it (G13)."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import uvicorn

from api.server import DrainingServer, refuse_newcomers
from tests.stack import wait_for

REQUEST = b"GET / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n"
PAST_A_TICK_S = 0.2  # uvicorn looks every tenth of a second whether it is to stop


class Gate:
    """An app whose first request keeps the whole event loop until it is let go."""

    def __init__(self) -> None:
        self.entered, self.open, self.never = threading.Event(), threading.Event(), threading.Event()

    async def __call__(self, scope, _receive, send) -> None:
        assert scope["type"] == "http"
        if not self.open.is_set():
            self.entered.set()
            assert self.open.wait(20)
            assert not self.never.wait(PAST_A_TICK_S)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})


@contextmanager
def stopping(n_waiting: int, send: Callable[[socket.socket], object]) -> Iterator[list[socket.socket]]:
    """Connections made while the server was busy; it learns that it is to stop before it can take them."""
    gate = Gate()
    # It takes two at a turn, so that most are still in the kernel's queue when it begins to stop.
    config = uvicorn.Config(
        gate, http="httptools", loop="asyncio", lifespan="off", backlog=1, timeout_graceful_shutdown=5
    )
    server = DrainingServer(config)
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        address = listener.getsockname()
        busy = stack.enter_context(socket.create_connection(address))
        busy.sendall(REQUEST)
        assert gate.entered.wait(20)
        listener.listen(128)
        waiting = [stack.enter_context(socket.create_connection(address, 20)) for _ in range(n_waiting)]
        for one in waiting:
            send(one)
        server.should_exit = True
        gate.open.set()
        yield waiting
        thread.join(20)
        assert not thread.is_alive()


def test_requests_that_came_before_the_end_are_answered() -> None:
    with stopping(20, lambda one: one.sendall(REQUEST)) as waiting:
        assert [one.recv(100)[:12] for one in waiting] == [b"HTTP/1.1 204"] * 20


def test_a_client_that_was_let_in_may_still_send() -> None:
    with stopping(1, lambda _: None) as [late]:
        assert select.select([late], [], [], 0.3)[0] == [], "neither answered nor closed"
        late.sendall(REQUEST)
        assert late.recv(100)[:12] == b"HTTP/1.1 204"


def test_one_that_says_nothing_is_not_waited_for() -> None:
    with stopping(1, lambda _: None) as [silent]:
        assert silent.recv(1) == b"", "closed in order, within the time of the join"


def test_newcomers_find_the_door_shut_and_those_inside_stay() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        inside = socket.create_connection(listener.getsockname(), 20)
        refuse_newcomers(listener)
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), 0.3)
        inside.sendall(b"still here")
        taken, _ = listener.accept()
        assert taken.recv(100) == b"still here"
        assert select.select([listener], [], [], 0)[0] == []
    taken.close()
    inside.close()


@pytest.mark.parametrize("n_processes", [1, 2])
def test_the_api_is_served_and_ends_when_told(world, n_processes: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        "RESIDENCY_HOME": str(world.settings.home_dir),
        "RESIDENCY_DATABASE_URL": world.database.url,
        "RESIDENCY_KEY_PEPPER": world.settings.key_pepper.get_secret_value(),
    }
    argv = [sys.executable, "-m", "api.server", "--port", str(port), "--workers", str(n_processes)]
    api = subprocess.Popen(argv, env=os.environ | environment)

    def ask() -> bool:
        with httpx.Client(headers={"authorization": f"Bearer {world.user}"}) as client:
            try:
                return client.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200
            except httpx.ConnectError:
                return False

    try:
        wait_for(ask, within_s=60, what="the API")
        api.send_signal(signal.SIGTERM)
        assert api.wait(20) in (0, -signal.SIGTERM)
    finally:
        api.kill()
        api.wait()
