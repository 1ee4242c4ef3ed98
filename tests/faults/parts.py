"""The processes of a running stack by the part they play, and what else a fault needs to know of it."""

import os
from pathlib import Path

import celery
import psutil
import pytest

from tests.stack import Stack
from workers.processes import MARKER

PARTS = ("api", "beat", "redis", "serve", "worker-cpu", "worker-train")
_WORDS = {"api": "api.server", "beat": "beat", "serve": "workers.serve"}


IN_FULL = bool(os.environ.get("FAULTS_FULL"))
SEED = int(os.environ.get("FAULTS_SEED") or 1)  # of all that is left to chance


def repeated(full: int, *, brief: int = 1, long: bool = False) -> pytest.MarkDecorator:
    """Runs a test `brief` times, or `full` times when `make faults G=n` asks for it; `number` counts.

    `long` puts the first of them into `make test-long`.
    """
    first = pytest.param(0, marks=[pytest.mark.long] if long else [])
    return pytest.mark.parametrize("number", [first, *range(1, full if IN_FULL else brief)], indirect=True)


def on_both(*, long: bool = False) -> pytest.MarkDecorator:
    """Runs a test on `residency up` and, in `make faults` alone, on the services of docker-compose.yml."""
    up = pytest.param("up", marks=[pytest.mark.long] if long else [])
    return pytest.mark.parametrize("stack", [up, "compose"], indirect=True)


def part(stack: Stack, name: str) -> list[psutil.Process]:
    """The process of a part, if it runs at this moment; one of `PARTS`."""
    return [child for child in stack.parts() if _plays(child, name)]


def pool(stack: Stack, queue: str) -> list[psutil.Process]:
    """The pool children of a worker; the one that carries an attempt out is its supervisor."""
    return children(part(stack, f"worker-{queue}"))


def children(parents: list[psutil.Process]) -> list[psutil.Process]:
    """The direct children of processes of which some may be gone."""
    found = []
    for parent in parents:
        try:
            found += parent.children()
        except psutil.NoSuchProcess:
            continue
    return found


def attempts(
    stack: Stack, kind: str = "", job_id: str = "", token: int | None = None
) -> list[psutil.Process]:
    """Living processes with the marker of an attempt of this stack, whatever they have become since."""
    inside = str(stack.home)
    asked = (kind, job_id, str(token) if token else "")
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARKER, "")
            here = inside in process.cwd() and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        # Of the installation, then these three; in a gang the rank of the host may follow.
        named = zip(asked, mark.split("/")[1:], strict=False)
        if mark and here and all(wanted in ("", field) for wanted, field in named):
            found.append(process)
    return found


def is_agent(process: psutil.Process) -> bool:
    """Whether it is a torchrun, rather than one of its ranks or what these started."""
    try:
        return "torch.distributed.run" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def environment(stack: Stack) -> dict[str, str]:
    """What the parts of the stack were given."""
    return part(stack, "api")[0].environ()


def ring(redis_url: str, queue: str, *, times: int) -> None:
    """Deliver the doorbell's message so many times."""
    with celery.Celery(broker=redis_url) as app:
        for _ in range(times):
            app.send_task("workers.ring", args=(queue,), queue=queue, retry=False)


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder: its size and when it was written."""
    return {
        path.relative_to(folder).as_posix(): ((seen := path.stat()).st_size, seen.st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def _plays(process: psutil.Process, name: str) -> bool:
    try:
        words = process.cmdline()
        if name == "redis":
            return process.name() == "redis-server"
        if name in _WORDS:
            return _WORDS[name] in words
        return any(word.startswith(name.removeprefix("worker-") + "@") for word in words)
    except psutil.NoSuchProcess:
        return False
