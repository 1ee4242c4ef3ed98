"""Faults that happen to real parts: killed and frozen processes, broken wires, full disks, damaged files."""

import asyncio
import errno
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil

Wire = Literal["open", "cut", "held"]


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL each of them that is still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, read or unread by its parent."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def slow_down(processes: Iterable[psutil.Process]) -> None:
    """Leave the cores to others: trainers of a tiny model take all they get, and a test only waits."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.nice(19)


@contextmanager
def frozen(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end: what a paused virtual machine, or one that swaps, looks like."""
    stopped = list(processes)
    for process in stopped:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


class Proxy:
    """A TCP port in front of a server, (host, port) or the path of a socket. Use as a context manager.

    `cut` ends every connection and refuses new ones; `held` keeps them, but no byte passes until it is open
    again; `delay_s` is what every piece of data waits in each direction.
    """

    def __init__(self, target: tuple[str, int] | Path, *, address: str = "127.0.0.1") -> None:
        self._target, self._address = target, address
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._streams: set[asyncio.StreamWriter] = set()
        self._flows: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._wire: Wire = "open"
        self.delay_s = 0.0
        self.port = 0

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def turn(self, wire: Wire) -> None:
        """Change the state of the wire, for connections there are and those to come."""
        self._call(self._turn(wire))

    def _call(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    async def _listen(self) -> None:
        self._open.set()
        self._server = await asyncio.start_server(self._serve, self._address, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _turn(self, wire: Wire) -> None:
        self._wire = wire
        if wire == "held":
            self._open.clear()
        else:
            self._open.set()
        if wire == "cut":
            for stream in list(self._streams):
                _break(stream)

    async def _close(self) -> None:
        self._server.close()
        await self._turn("cut")
        if self._flows:
            await asyncio.wait(self._flows, timeout=5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._wire == "cut":
            _break(writer)
            return
        try:
            if isinstance(self._target, Path):
                back = await asyncio.open_unix_connection(self._target)
            else:
                back = await asyncio.open_connection(*self._target)
        except OSError:  # the server is away: so is the port, as far as a client can see
            _break(writer)
            return
        for source, sink in ((reader, back[1]), (back[0], writer)):
            flow = asyncio.create_task(self._pass_on(source, sink))
            self._flows.add(flow)
            flow.add_done_callback(self._flows.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        self._streams.add(sink)
        try:
            with suppress(OSError):
                while data := await source.read(65536):
                    await asyncio.sleep(self.delay_s)
                    await self._open.wait()
                    sink.write(data)
                    await sink.drain()
        finally:
            self._streams.discard(sink)
            sink.close()


def _break(stream: asyncio.StreamWriter) -> None:
    """End a connection as a crash does, with a reset: an end in order would look like the server's wish."""
    at_once = struct.pack("ii", 1, 0)
    stream.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    stream.transport.abort()


def may_mount() -> bool:
    """Whether this process may make small disks: root may, unless a container forbids it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), 4096):
                return True
        except subprocess.CalledProcessError:
            return False


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """A file system of so many bytes over `folder`, which must exist; see `may_mount`."""
    options = ["-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs"]
    subprocess.run(["/bin/mount", *options, folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["/bin/umount", "--lazy", folder], check=True)


def fill(folder: Path, *, leave_bytes: int = 0) -> Path:
    """Take the free space of the disk under `folder` but for so many bytes; unlink the file to end it."""
    ballast = folder / "ballast"
    with ballast.open("wb") as out:
        while (free := _free_bytes(folder) - leave_bytes) > 0:
            try:
                os.posix_fallocate(out.fileno(), out.seek(0, os.SEEK_END), free)
            except OSError as error:  # others that write there were faster
                if error.errno != errno.ENOSPC:
                    raise
    return ballast


def _free_bytes(folder: Path) -> int:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    """Cut the last byte off a file."""
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: tuple[Callable[[Path], None], ...] = (flip, shorten, Path.unlink)
