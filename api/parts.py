"""The processes of the service: `residency up` starts these, and docker-compose.yml has the same commands."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_CPU_TASKS = 2  # so that the check of a small file need not wait for the import of a large model


@dataclass
class Part:
    """One process of the service."""

    name: str
    argv: list[str]
    stop_within_s: float
    stops_last: bool = False
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    deaths: int = 0
    again_at: float = 0.0


def list_parts(
    *, home: Path, host: str, port: int, workers: int, dashboard_port: int | None = None
) -> list[Part]:
    """Every part but database and broker, in the order in which they are best started."""
    python = [sys.executable, "-m"]
    celery = [*python, "celery", "-A", "workers.app"]
    options = ["--without-gossip", "--without-mingle", "--loglevel", "INFO"]
    parts = [Part("serve", [*python, "workers.serve"], stop_within_s=30)]
    for queue, concurrency in (("cpu", _CPU_TASKS), ("train", workers)):
        name = f"{queue}@{os.uname().nodename}"
        worker = [*celery, "worker", "-Q", queue, "-c", str(concurrency), "-n", name, *options]
        # a trainer may take two minutes to save its checkpoint
        parts.append(Part(f"worker-{queue}", worker, stop_within_s=150))
    schedule = home / "beat-schedule"
    beat = [*celery, "beat", "--schedule", str(schedule), "--pidfile", "", "--loglevel", "WARNING"]
    parts.append(Part("beat", beat, stop_within_s=10))
    api = [*python, "api.server", "--host", host, "--port", str(port)]
    parts.append(Part("api", api, stop_within_s=15))
    if dashboard_port is not None:  # it finds the API by RESIDENCY_URL
        pages = [*python, "api.cli", "dashboard", "--host", host, "--port", str(dashboard_port)]
        parts.append(Part("dashboard", pages, stop_within_s=10))
    return parts
