"""Keeps this node's engines as the database desires them: `python -m workers.serve`."""

import json
import logging
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy.exc import OperationalError

from db import deployments, logs
from db.models import Deployment, Model
from db.session import Database
from db.settings import DatabaseSettings
from workers import processes
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)
_TICK_S = 0.5
_PROBE_EVERY_S = 5.0
_PROBES_FAILED_MAX = 3
_STEADY_S = 600.0  # an engine up for so long has its earlier deaths forgiven


@dataclass
class Engine:
    """A running engine process and what was last seen of it."""

    process: subprocess.Popen[bytes]
    marker: str
    folder: Path
    started_at: float = field(default_factory=time.monotonic)
    address: str | None = None
    probed_at: float = 0.0
    probes_failed: int = 0

    @property
    def log_path(self) -> Path:
        """Everything the engine printed."""
        return self.folder / "log.txt"


class Reconciler:
    """One loop a node: starts, probes, restarts and stops engines until reality equals `desired`."""

    def __init__(self, database: Database, settings: WorkerSettings, *, home: Path) -> None:
        self._database, self._settings, self._home = database, settings, home
        self._engines: dict[str, Engine] = {}

    def tick(self) -> None:
        """Compare and act once. Database errors leave everything as it runs."""
        with self._database.read() as session:
            unclaimed = deployments.any_unclaimed(session)
        if unclaimed:
            with self._database.write() as session:
                deployments.adopt(session, node=self._settings.node)
        with self._database.read() as session:
            rows = deployments.of_node(session, node=self._settings.node)
        self._make_room([deployment for deployment, _ in rows if deployment.desired == "running"])
        for deployment, model in rows:
            self._reconcile(deployment, model)

    def stop_all(self) -> None:
        """End every engine; the deployments wait for the next start of a node."""
        for engine in self._engines.values():
            engine.process.terminate()
        for deployment_id, engine in self._engines.items():
            self._end(engine)
            self._report(deployment_id, status="pending", address=None)
        self._engines.clear()

    def _reconcile(self, deployment: Deployment, model: Model) -> None:
        engine = self._engines.get(deployment.id)
        if deployment.desired == "stopped" or model.deleted_at is not None:
            if engine is not None:
                self._end(engine)
                del self._engines[deployment.id]
            self._report(deployment.id, status="stopped", address=None)
        elif deployment.status == "failed":
            return
        elif engine is None:
            self._start(deployment, model)
        elif engine.process.poll() is not None or self._took_too_long(engine):
            self._restart_or_fail(deployment, engine)
        elif engine.address is None:
            self._look_for_ready(deployment, engine)
        elif time.monotonic() - engine.probed_at > _PROBE_EVERY_S:
            self._probe(deployment, engine)

    def _start(self, deployment: Deployment, model: Model) -> None:
        folder = self._home / "engines" / deployment.id
        folder.mkdir(parents=True, exist_ok=True)
        ready_file = folder / "ready.json"
        ready_file.unlink(missing_ok=True)
        marker = processes.marker_of(self._database.url, "engine", deployment.id, 0)
        processes.sweep(marker)  # an engine of an earlier reconciler
        argv = processes.module_command(
            "trainers.engine",
            *_describe_weights(model),
            "--model-id",
            model.id,
            "--host",
            self._settings.engine_host,
            "--port",
            "0",
            "--ready-file",
            str(ready_file),
        )
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        env = processes.child_environment(marker, CUDA_VISIBLE_DEVICES=gpus)
        process = processes.spawn(argv, env=env, cwd=folder, log_path=folder / "log.txt")
        self._engines[deployment.id] = Engine(process=process, marker=marker, folder=folder)
        logger.info("engine of %s started for %s", deployment.id, model.id)
        self._report(deployment.id, status="loading", address=None)

    def _look_for_ready(self, deployment: Deployment, engine: Engine) -> None:
        ready = _read_ready(engine.folder / "ready.json")
        if ready is None:
            return
        engine.address = f"http://{self._settings.engine_host}:{ready}"
        engine.probed_at = time.monotonic()
        logger.info("engine of %s answers at %s", deployment.id, engine.address)
        self._report(deployment.id, status="ready", address=engine.address)

    def _probe(self, deployment: Deployment, engine: Engine) -> None:
        engine.probed_at = time.monotonic()
        if _is_healthy(engine.address):
            engine.probes_failed = 0
            if deployment.restarts and time.monotonic() - engine.started_at > _STEADY_S:
                self._report(deployment.id, status="ready", address=engine.address, restarts=0)
            return
        engine.probes_failed += 1
        if engine.probes_failed >= _PROBES_FAILED_MAX:
            logger.warning("engine of %s no longer answers", deployment.id)
            self._restart_or_fail(deployment, engine)

    def _took_too_long(self, engine: Engine) -> bool:
        waited_s = time.monotonic() - engine.started_at
        return engine.address is None and waited_s > self._settings.engine_start_s

    def _restart_or_fail(self, deployment: Deployment, engine: Engine) -> None:
        self._end(engine)
        del self._engines[deployment.id]
        restarts = deployment.restarts + 1
        if restarts > self._settings.engine_restarts:
            last_lines = processes.tail(engine.log_path)[-1000:]
            error = {
                "code": "engine_failed",
                "message": f"The engine died {restarts} times.",
                "log": last_lines,
            }
            self._report(deployment.id, status="failed", address=None, error=error, restarts=restarts)
        else:
            logger.warning("engine of %s died; restart %s", deployment.id, restarts)
            self._report(deployment.id, status="loading", address=None, restarts=restarts)

    def _make_room(self, wanted: list[Deployment]) -> None:
        """Stop automatic engines, least recently used first, while there are more than the node may run."""
        surplus = len(wanted) - self._settings.max_engines
        for deployment in [row for row in wanted if row.auto][: max(0, surplus)]:
            logger.info("automatic deployment %s gives way", deployment.id)
            deployment.desired = "stopped"

    def _end(self, engine: Engine) -> None:
        engine.process.terminate()
        try:
            engine.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            logger.warning("engine %s ignored SIGTERM", engine.process.pid)
        processes.sweep(engine.marker)
        engine.process.wait()

    def _report(self, deployment_id: str, *, status: str, **values: Any) -> None:
        with self._database.write() as session:
            deployments.report(session, deployment_id, status=status, **values)


def _describe_weights(model: Model) -> list[str]:
    """Where they are, and the sum without which the engine serves nothing."""
    if model.manifest_sha256 is None:
        return [str(model.path), "--digest", str(model.digest)]
    return [str(model.path), "--adapter", str(model.adapter_path), "--manifest-sha256", model.manifest_sha256]


def _read_ready(path: Path) -> int | None:
    return int(json.loads(path.read_text())["port"]) if path.is_file() else None


def _is_healthy(address: str | None) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    logs.configure()
    paths = DatabaseSettings()
    database = Database(paths.url)
    settings = WorkerSettings()
    reconciler = Reconciler(database, settings, home=paths.home_dir)
    alive = paths.home_dir / "engines" / f"{settings.node}.alive"  # its time is what a health check looks at
    alive.parent.mkdir(parents=True, exist_ok=True)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    while not stopping.wait(_TICK_S):
        try:
            reconciler.tick()
            alive.touch()
        except OperationalError as error:
            logger.warning("database away, engines go on: %s", error)
    reconciler.stop_all()


if __name__ == "__main__":
    main()
