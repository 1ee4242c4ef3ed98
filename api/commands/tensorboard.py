"""`residency tensorboard`: the curves of jobs in TensorBoard, from the event files in the home."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from api.client import DEFAULT_HOME, ClientError

_EVENTS = "*/*/tensorboard/events.out.tfevents.*"  # JOB/ATTEMPT/tensorboard below the folder of runs


def tensorboard(
    jobs: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB]...", help="Without any: all, also those to come.")
    ] = None,
    *,
    home: Annotated[
        Path, typer.Option(envvar="RESIDENCY_HOME", help="Where all data is kept.", file_okay=False)
    ] = Path(DEFAULT_HOME),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 6006,
) -> None:
    """Start TensorBoard on what training wrote on this machine; Ctrl-C stops it."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ClientError("TensorBoard is not installed here: pip install 'residency[train]'.")
    runs = home.expanduser().absolute() / "runs"
    with _folder_of(runs, jobs or []) as folder:
        command = [sys.executable, "-m", "tensorboard.main"]
        command += ["--logdir", str(folder), "--host", host, "--port", str(port)]
        raise typer.Exit(_run(command))


@contextmanager
def _folder_of(runs: Path, jobs: list[str]) -> Iterator[Path]:
    """A folder with the runs of `jobs` alone. Raises ClientError where a job has no event files."""
    with_events = {path.relative_to(runs).parts[0] for path in runs.glob(_EVENTS)}
    if not with_events:
        raise ClientError(f"No job has written event files in {runs}.")
    if without := [job for job in jobs if job not in with_events]:
        raise ClientError(f"No event files in {runs} of: {', '.join(without)}.")
    if not jobs:
        yield runs
        return
    with tempfile.TemporaryDirectory(prefix="residency-tensorboard-") as folder:
        for job in set(jobs):
            (Path(folder) / job).symlink_to(runs / job)
        yield Path(folder)


def _run(command: list[str]) -> int:
    """Run until it ends or we are told to stop; its exit status, 0 if we were."""
    stopped = False
    process = subprocess.Popen(command, env=os.environ | {"PYTHONSAFEPATH": "1"}, start_new_session=True)

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    status = process.wait()
    return 0 if stopped else status
