"""The services of docker-compose.yml as a stack that tests use like `residency up`, and may break."""

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from sqlalchemy.engine import make_url

from tests.deploy.compose import Deployment, services
from tests.stack import Stack, processes_of

PROFILE = "cpu"
_PAUSE_S, _LONGEST_PAUSE_S, _STEADY_S = 0.1, 60.0, 10.0  # Docker's, before it starts a container again


@contextmanager
def deployed(model: Path, settings: dict[str, str] | None = None) -> Iterator[Deployment]:
    """The CPU profile with `settings` laid over its environments; `model` may be imported as `tiny`."""
    folder = Path(tempfile.mkdtemp(prefix="residency-deploy-"))
    folder.chmod(0o711)
    deployment = Deployment(folder, settings or {})
    shutil.copytree(model, deployment.volume("imports") / "tiny")
    try:
        deployment.start_all(PROFILE)
        yield deployment
    finally:
        for name in deployment.processes:
            sys.stdout.write(f"--- {name} ---\n{deployment.log(name)[-3000:]}\n")  # shown if the test fails
        for process in processes_of(folder):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes_of(folder), timeout=20)
        shutil.rmtree(folder)


@contextmanager
def compose_stack(model: Path, settings: dict[str, str]) -> Iterator["ComposeStack"]:
    """The stack with `model` imported as `tiny`. It must stop in order and leave no process."""
    with deployed(model, settings) as deployment:
        stack = ComposeStack(deployment)
        with stack.kept_up():
            stack.import_model(deployment.volume("imports") / "tiny", model_id="tiny")
            yield stack
            assert stack.stop() == 0
        assert processes_of(deployment.folder) == []


class ComposeStack(Stack):
    """The services of a deployment. The names of `down` and `log` are those of the file."""

    def __init__(self, deployment: Deployment) -> None:
        self.home, self.port = deployment.volume("data"), deployment.ports["8700"]
        environment = deployment.environment("api")
        secret = Path(environment["RESIDENCY_SECRETS_DIR"]) / "residency_database_password"
        url = make_url(environment["RESIDENCY_DATABASE_URL"]).set(password=secret.read_text().strip())
        self.database_url = url.render_as_string(hide_password=False)
        self._deployment = deployment
        self._kept = {name for name, service in services(PROFILE).items() if service["restart"] != "no"}
        self._pause_s = dict.fromkeys(self._kept, _PAUSE_S)
        self._again_at = dict.fromkeys(self._kept, time.monotonic())
        self._ended: set[str] = set()
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """The admin key."""
        return (self._deployment.volume("keys") / "admin.key").read_text().strip()

    def parts(self) -> list[psutil.Process]:
        """The main process of each service that runs at this moment."""
        found = []
        for process in list(self._deployment.processes.values()):
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(process.pid))
        return found

    def log(self, part: str) -> str:
        """What a service printed."""
        return self._deployment.log(part)

    def stop(self, number: int = 0) -> int:
        """Stop every service as Docker does, the last started first; 0 if each stopped in its time."""
        del number  # each has its own
        with self._lock:
            self._kept.clear()
        for name in reversed([*self._deployment.processes]):
            if self._deployment.processes[name].poll() is None:
                self._deployment.stop(name)
        return 0

    @contextmanager
    def kept_up(self) -> Iterator[None]:
        """`restart: unless-stopped`: a service that ends is started again, after a pause that grows."""
        over = threading.Event()

        def watch() -> None:  # what this thread starts dies with it
            while not over.wait(_PAUSE_S):
                with self._lock:
                    for name in sorted(self._kept):
                        self._start_if_ended(name)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    @contextmanager
    def down(self, name: str, number: int) -> Iterator[None]:
        """End a service by a signal. Only when this is over it is started again."""
        process = self._deployment.processes[name]
        with self._lock:
            self._kept.discard(name)
        process.send_signal(number)
        process.wait(timeout=60)
        _end_container(process.pid)
        try:
            yield
        finally:
            with self._lock:
                self._deployment.start(name)
                self._kept.add(name)

    def volume(self, name: str) -> Path:
        """Where a volume of the file lies."""
        return self._deployment.volume(name)

    def _start_if_ended(self, name: str) -> None:
        process, now = self._deployment.processes[name], time.monotonic()
        if process.poll() is None:
            if now > self._again_at[name] + _STEADY_S:
                self._pause_s[name] = _PAUSE_S
        elif name not in self._ended:
            _end_container(process.pid)
            self._ended.add(name)
            self._again_at[name] = now + self._pause_s[name]
            self._pause_s[name] = min(2 * self._pause_s[name], _LONGEST_PAUSE_S)
        elif now > self._again_at[name]:
            self._ended.discard(name)
            self._deployment.start(name)


def _end_container(main: int) -> None:
    """Kill what a main process left behind in its session, as the end of a container does."""
    left = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if process.pid != main and os.getsid(process.pid) == main:
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=20)
