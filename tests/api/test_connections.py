"""Connections that break at their worst moment."""

import asyncio
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
import uvloop

from api.chat import new_client
from api.dashboard.client import Api, Unreachable, connect

_AT_ONCE, _ROUNDS = 100, 10
_MANY_ROUNDS = 100  # one in five is reset at just that moment, on a busy machine fewer


@pytest.fixture
def resetting() -> Iterator[str]:
    """The address of a server that resets each connection as soon as it stands."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # the server was closed
                    return
                # Without lingering, a close is a reset.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_connection_reset_at_once_is_a_lost_connection_to_chat(resetting: str) -> None:
    async def ask(client: httpx.AsyncClient, seen: Counter[bool]) -> None:
        try:
            await client.get(resetting)
        except httpx.TransportError as error:
            seen[isinstance(error.__cause__, AttributeError)] += 1

    async def main() -> Counter[bool]:
        seen: Counter[bool] = Counter()
        rounds = 0
        async with new_client() as client:
            while not seen[True] and rounds < _MANY_ROUNDS:
                await asyncio.gather(*(ask(client, seen) for _ in range(_AT_ONCE)))
                rounds += 1
        assert seen.total() == _AT_ONCE * rounds
        return seen

    assert uvloop.run(main())[True] > 0, "no connection was reset at that moment: nothing was tried"


def test_and_to_a_page_of_the_dashboard(resetting: str) -> None:
    async def ask(api: Api) -> None:
        with pytest.raises(Unreachable, match=r"No server answers|The connection to"):
            await api.get("/v1/models")

    async def main() -> None:
        async with connect(resetting) as http:
            api = Api(http, "a key")
            for _ in range(_ROUNDS):
                await asyncio.gather(*(ask(api) for _ in range(_AT_ONCE)))

    uvloop.run(main())
