"""Hosts that each run a training worker: network namespaces with a cable each, or all on one address.

Root may make namespaces, unless a container forbids it. Without them a host is a worker with a node's name of
its own, and what is cut is its wires to the database and to Redis, not those between trainers.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

from tests.faults.injections import Proxy, is_gone, kill
from tests.stack import wait_for


@cache
def may_make_namespaces() -> bool:
    """Whether this process may make network namespaces."""
    name = f"residency-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        try:
            _ip("netns", "exec", name, "true")
        finally:
            _ip("netns", "del", name)
    except (subprocess.CalledProcessError, FileNotFoundError):  # not allowed, or no `ip`
        return False
    return True


class Network:
    """What joins hosts with each other and with the servers. Use as a context manager."""

    def __init__(self, *, namespaces: bool) -> None:
        self.namespaces = namespaces
        self._id, self._life, self._n_hosts = os.getpid(), ExitStack(), 0
        self._subnet, self._bridge = f"10.77.{os.getpid() % 256}", f"rsb{os.getpid()}"

    @property
    def address(self) -> str:
        """Where hosts reach the servers."""
        return f"{self._subnet}.1" if self.namespaces else "127.0.0.1"

    def __enter__(self) -> "Network":
        if self.namespaces:
            _ip("link", "add", self._bridge, "type", "bridge")
            self._life.callback(_ip, "link", "del", self._bridge)
            _ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._life.close()

    def plug_in(self) -> tuple[str, str] | None:
        """A namespace on the bridge: its name, and the end of its cable that is at the bridge."""
        if not self.namespaces:
            return None
        self._n_hosts += 1
        name, cable = f"residency-{self._id}-{self._n_hosts}", f"rsv{self._id}n{self._n_hosts}"
        inside = ("-n", name)
        _ip("netns", "add", name)
        self._life.callback(_ip, "netns", "del", name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "addr", "add", f"{self._subnet}.{self._n_hosts + 1}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        _ip("link", "set", cable, "master", self._bridge, "up")
        return name, cable


@dataclass
class Host:
    """A machine with one training slot, on the shared folder. As a context manager it runs."""

    name: str
    network: Network
    env: dict[str, str]
    log: Path
    wires: list[Proxy] = field(default_factory=list)  # to the servers, of this host alone
    command: list[str] | None = None  # in place of the worker

    def __post_init__(self) -> None:
        self._place = self.network.plug_in()

    def __enter__(self) -> "Host":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join()
        self.stop()

    def start(self) -> None:
        """Switch it on."""
        worker = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", "train", "-c", "1"]
        worker += ["-n", f"train@{self.name}", "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
        env = self.env | {"RESIDENCY_NODE": self.name, "RESIDENCY_GPUS": "none"}
        inside = ["ip", "netns", "exec", self._place[0]] if self._place else []
        with self.log.open("ab") as log:
            self._worker = subprocess.Popen(
                [*inside, *(self.command or worker)], env=env, stdout=log, stderr=log
            )

    def processes(self) -> list[psutil.Process]:
        """All that runs on it."""
        if self._place:
            return [psutil.Process(int(pid)) for pid in _ip("netns", "pids", self._place[0]).split()]
        worker = psutil.Process(self._worker.pid)
        return [worker, *worker.children(recursive=True)]

    def kill(self) -> None:
        """End it as a power cut would."""
        killed = self.processes()
        kill(killed)
        self._worker.wait()
        wait_for(lambda: all(map(is_gone, killed)), within_s=10, what=f"the end of {self.name}")

    def stop(self) -> None:
        """Shut it down in order."""
        self._worker.terminate()
        self._worker.wait(timeout=150)

    def cut(self) -> None:
        """Pull its cable: it runs on, alone."""
        if self._place:
            _ip("link", "set", self._place[1], "down")
        else:
            for wire in self.wires:
                wire.turn("held")

    def join(self) -> None:
        """Plug its cable in again."""
        if self._place:
            _ip("link", "set", self._place[1], "up")
        for wire in self.wires:
            wire.turn("open")


def _ip(*words: str) -> str:
    command = ["ip", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
