"""`python -m api.server`: serves the API by uvicorn; told to stop, it answers whoever it let in."""

import argparse
import asyncio
import ctypes
import logging
import select
import socket
import struct
import sys

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import multiprocess

logger = logging.getLogger("uvicorn.error")
_ANSWER_WITHIN_S = 5
_FIRST_REQUEST_WITHIN_S = 1.0
_POLL_S = 0.01
_TURNS = 10  # of the event loop: more than it takes from an accepted connection to one that uvicorn counts
_HUNG_AFTER_S = 60  # a process may be slow to say that it lives while an upload keeps it busy
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_BPF_RETURN = 0x06


class DrainingServer(uvicorn.Server):
    """Takes what the kernel holds for it before it closes its sockets.

    A client's connection stands, and its request may be sent, before the server accepts it. uvicorn closes
    the listening socket at once, and a connection too on which no request was read: both are then reset.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept and read what has come, then end as uvicorn does."""
        listening = sockets or []
        if self.config.workers == 1:  # otherwise the socket is everybody's, and the parent has seen to it
            for sock in listening:
                refuse_newcomers(sock)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _FIRST_REQUEST_WITHIN_S
        while loop.time() < deadline:
            any_waited = _any_waits(listening)
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            if not any_waited and not self._any_unread():
                break
            await asyncio.sleep(_POLL_S)
        await super().shutdown(sockets)

    def _any_unread(self) -> bool:
        return any(getattr(held, "cycle", held) is None for held in self.server_state.connections)


class Processes(multiprocess.Multiprocess):
    """uvicorn's supervisor of several processes that accept on one socket."""

    def terminate_all(self) -> None:
        """Stop all, once nobody else can enter the queue that they empty."""
        for sock in self.sockets:
            refuse_newcomers(sock)
        super().terminate_all()


# Its children, which import this module too, make their server by this name; one cannot say which otherwise.
multiprocess.Server = DrainingServer  # pyright: ignore[reportPrivateImportUsage]


def refuse_newcomers(sock: socket.socket) -> None:
    """Let no connection enter the queue of a listening socket any more; those in it stay.

    Its packets are dropped, so a client that knocks tries again a second later, and is then refused or finds
    the next process there.
    """
    program = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, 0))
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))
    except OSError as error:  # a kernel without socket filters: then the last ones may be reset
        logger.warning("Connections still come in while the server stops: %s", error)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m api.server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--workers", type=int, default=1, help="processes that accept on the port")
    options = parser.parse_args()
    config = uvicorn.Config(
        "api.main:create_app",
        factory=True,
        host=options.host,
        port=options.port,
        workers=options.workers,
        http="httptools",
        access_log=False,
        timeout_graceful_shutdown=_ANSWER_WITHIN_S,
        timeout_worker_healthcheck=_HUNG_AFTER_S,
    )
    sock = config.bind_socket()
    if options.workers > 1:
        Processes(config, [sock]).run()
    else:
        server = DrainingServer(config)
        server.run([sock])
        sys.exit(0 if server.started else STARTUP_FAILURE)


def _any_waits(listening: list[socket.socket]) -> bool:
    return bool(select.select(listening, [], [], 0)[0])


if __name__ == "__main__":
    main()
