"""Watches a job: its events as they come, the log of its training process, how far it is."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from typing import Any, ParamSpec, TypeVar

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from api import client as http
from api.client import Client, Refused, Unreachable, locate
from api.commands.output import errors, format_duration, out, plain, strip_controls

TERMINAL = ("succeeded", "failed", "cancelled")
# Training goes on while the API is restarted, so whoever watches it may wait.
PATIENCE_S = 120.0
Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")
_LEVEL_STYLES = {"warn": "yellow", "error": "red"}


def follow_job(client: Client, job_id: str) -> int:
    """Print events above a progress bar until the job is over. The exit status: 0 if it succeeded, else 1."""
    path = locate("fine_tuning", "jobs", job_id)
    job = client.get(path)
    last_event_id = None
    losses: dict[str, float] = {}
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[summary]}"),
    )
    with _detachable_job(job_id), Progress(*columns, console=out, transient=True) as progress:
        bar = progress.add_task(job["status"], total=None, summary="")
        while True:
            # The events are asked for after the job: when it is over, all of them are there.
            for event in insist(read_events, client, job_id, after=last_event_id):
                print_event(event)
                last_event_id = event["id"]
                losses |= _losses(event)
            if job["status"] in TERMINAL:
                break
            _move_bar(progress, bar, job=job, losses=losses)
            time.sleep(http.POLL_EVERY_S)
            job = insist(client.get, path)
    return _conclude(job)


def follow_log(client: Client, job_id: str) -> int:
    """Print the training process's log until the job is over. The exit status: 0 if it succeeded, else 1."""
    path = locate("fine_tuning", "jobs", job_id)

    def is_over() -> bool:
        return insist(client.get, path)["status"] in TERMINAL

    with _detachable_job(job_id):
        for text in read_log(client, job_id, is_over=is_over):
            typer.echo(text, nl=False)
    return _conclude(client.get(path))


def read_events(client: Client, job_id: str, *, after: str | None = None) -> list[dict[str, Any]]:
    """The events that follow `after`, oldest first."""
    path = locate("fine_tuning", "jobs", job_id, "events")
    return client.list_all(path, order="asc", limit=100, after=after)


def read_log(client: Client, job_id: str, *, is_over: Callable[[], bool] = lambda: True) -> Iterator[str]:
    """The log of the newest attempt's training process, piece by piece, until no more of it can come."""
    path = locate("fine_tuning", "jobs", job_id, "logs")
    offset_bytes, attempt = 0, None
    while True:
        over = is_over()  # asked first: what was written before it is still read
        while True:
            piece, headers = insist(client.get_bytes, path, offset=offset_bytes)
            if attempt != (attempt := headers.get("x-attempt")) and offset_bytes:
                offset_bytes = 0  # a new attempt writes a new log
                continue
            if not piece:
                break
            offset_bytes = int(headers["x-next-offset"])
            yield strip_controls(piece.decode(errors="replace"))
        if over:
            return
        time.sleep(http.POLL_EVERY_S)


def print_event(event: dict[str, Any]) -> None:
    """A line: local time and what happened."""
    when = datetime.fromtimestamp(event["created_at"]).strftime("%H:%M:%S")
    style = _LEVEL_STYLES.get(event["level"], "dim" if event["type"] == "metrics" else "")
    out.print(
        Text(f"{when}  ", style="dim").append_text(Text(plain(event["message"]).plain, style=style)),
        soft_wrap=True,
    )


def insist(ask: Callable[Asked, Answer], *args: Asked.args, **kwargs: Asked.kwargs) -> Answer:
    """Ask again for a while when the server is away for a moment."""
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask(*args, **kwargs)
        except (Unreachable, Refused) as error:
            passing = isinstance(error, Unreachable) or error.status >= 500
            if not passing or time.monotonic() > give_up_at:
                raise
        time.sleep(http.POLL_EVERY_S)


@contextmanager
def detachable(what: str, *, hint: str) -> Iterator[None]:
    """Ctrl-C ends the watching, not what is watched; say so."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"The {what} goes on. Watch it with `{hint}`.")
        raise typer.Exit(130) from None


def _detachable_job(job_id: str) -> AbstractContextManager[None]:
    return detachable("job", hint=f"residency jobs logs {job_id} -f")


def _losses(event: dict[str, Any]) -> dict[str, float]:
    data = event["data"] or {}
    return {
        label: data[key]
        for label, key in (("loss", "train_loss"), ("held-out", "valid_loss"))
        if event["type"] == "metrics" and data.get(key) is not None
    }


def _move_bar(progress: Progress, bar: TaskID, *, job: dict[str, Any], losses: dict[str, float]) -> None:
    done = job.get("progress") or {}
    parts = [f"{name} {value:.3f}" for name, value in losses.items()]
    if done:
        parts.insert(0, f"{done['step']}/{done['total_steps']}")
        if done.get("tokens_per_s"):
            parts.append(f"{done['tokens_per_s']:.0f} tokens/s")
        parts.append(f"{format_duration(done.get('eta_seconds'))} left")
    progress.update(
        bar,
        description=job.get("phase") or job["status"],
        completed=done.get("step", 0),
        total=done.get("total_steps"),
        summary="  ".join(parts),
    )


def _conclude(job: dict[str, Any]) -> int:
    if job["status"] == "succeeded":
        out.print(f"{job['id']} succeeded: {job['fine_tuned_model']}", style="green")
        return 0
    reason = (job["error"] or {}).get("message")
    errors.print(plain(f"{job['id']} {job['status']}" + (f": {reason}" if reason else "")), style="red")
    return 1
