"""The whole service as a user starts it, `residency up`, on a home of its own."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from openai import DefaultHttpxClient, OpenAI

T = TypeVar("T")
CERTIFICATES = ssl.create_default_context()  # read once, not by each of the many clients of each test
# Production waits a minute before it believes that a worker is dead; tests have less patience.
METRICS_TOKEN = "a-token-for-whoever-watches"
FAST = {
    "RESIDENCY_METRICS_TOKEN": METRICS_TOKEN,
    "RESIDENCY_LEASE_TTL_S": "6",
    "RESIDENCY_HEARTBEAT_S": "1",
    "RESIDENCY_TICK_S": "1",
    "RESIDENCY_STOP_GRACE_S": "30",
    "RESIDENCY_GPUS": "none",
}


def wait_for(ask: Callable[[], T], *, within_s: float, what: str, every_s: float = 0.2) -> T:
    """The first truthy answer of `ask`; fails with `what` when none comes in time."""
    deadline = time.monotonic() + within_s
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"waited {within_s} s in vain for: {what}"
        time.sleep(every_s)
    return answer


def processes_of(home: Path) -> list[psutil.Process]:
    """Every living process that names `home` in its command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                if any(str(home) in word for word in words):
                    found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@dataclass
class Stack:
    """A running `residency up`."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]
    database_url: str

    @property
    def url(self) -> str:
        """Base URL, with /v1."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def key(self) -> str:
        """The admin key."""
        return (self.home / "admin.key").read_text().strip()

    def sdk(self, **options: Any) -> OpenAI:
        """The official client, unchanged."""
        client = DefaultHttpxClient(verify=CERTIFICATES)
        return OpenAI(base_url=self.url, api_key=self.key, http_client=client, **options)

    def http(self) -> httpx.Client:
        """A plain client with the key set."""
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=300,
            trust_env=False,
            verify=CERTIFICATES,
        )

    def import_model(self, folder: Path, *, model_id: str) -> None:
        """Import `folder` and wait until the model is ready."""
        with self.http() as client:
            answer = client.post("/models/import", json={"id": model_id, "source": str(folder)})
            assert answer.status_code == 200, answer.text

            def done() -> dict[str, Any] | None:
                model = client.get(f"/models/{model_id}").json()
                return None if model["status"] == "importing" else model

            model = wait_for(done, within_s=200, what=f"import of {model_id}")
            assert model["status"] == "ready", model

    def parts(self) -> list[psutil.Process]:
        """The process of each part that runs at this moment."""
        return psutil.Process(self.process.pid).children()

    def log(self, part: str) -> str:
        """What a part printed."""
        return (self.home / "logs" / f"{part}.log").read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal to `up` and wait for its end; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=300)


def users_shell() -> dict[str, str]:
    """What a user's shell would hold: suites set RESIDENCY_* for themselves, and pytest tells of itself."""
    ours = ("RESIDENCY_", "PYTEST_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def start_stack(
    home: Path, *, import_dirs: list[Path], workers: int = 1, dashboard_port: int | None = None, **env: str
) -> Stack:
    """Start `residency up` and wait until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "api.cli", "up", "--home", str(home), "--port", str(port)]
    argv += ["--workers", str(workers)]
    argv += ["--no-dashboard"] if dashboard_port is None else ["--dashboard-port", str(dashboard_port)]
    for folder in import_dirs:
        argv += ["--import-dir", str(folder)]
    with home.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(argv, env=users_shell() | FAST | env, stdout=log, stderr=log)
    database_url = env.get("RESIDENCY_DATABASE_URL", f"sqlite:///{home / 'residency.db'}")
    stack = Stack(home=home, port=port, process=process, database_url=database_url)

    def ready() -> bool:
        assert process.poll() is None, home.with_suffix(".log").read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5, verify=CERTIFICATES).is_success
        except httpx.TransportError:
            return False

    wait_for(ready, within_s=200, what="residency up")
    return stack
