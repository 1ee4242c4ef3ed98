"""One-off child processes of the second queue: run, keep the lease, read the report."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from workers import processes, shutdown
from workers.leases import Heartbeat


class ChildFailed(RuntimeError):
    """The child ended without a report; the message holds the end of its output."""


def run_for_report(
    argv: list[str],
    *,
    report_path: Path,
    marker: str,
    heartbeat: Heartbeat,
    log_path: Path,
    wants_stop: Callable[[Session], bool] = lambda _: False,
    extra_env: Mapping[str, str] | None = None,
    writable: Sequence[Path] = (),
) -> dict[str, Any] | None:
    """Run `argv` until it has written `report_path`; None when a shutdown or `wants_stop` ended it early.

    It can write below the folder of its log and `writable`.
    `wants_stop` is asked inside each heartbeat's transaction. Raises `ChildFailed` when there is no report,
    `LeaseLost` when another owner exists.
    """
    report_path.unlink(missing_ok=True)
    stopped = False

    def on_beat() -> bool:
        nonlocal stopped
        wants = heartbeat.beat(wants_stop)
        stopped = stopped or bool(wants) or shutdown.requested()
        return stopped

    env = processes.child_environment(marker, **(extra_env or {}))
    child = processes.spawn(argv, env=env, cwd=log_path.parent, log_path=log_path, writable=writable)
    processes.supervise(child, marker=marker, on_beat=on_beat, beat_s=heartbeat.interval_s, grace_s=5.0)
    if report_path.is_file():
        return json.loads(report_path.read_text())
    if stopped:
        return None
    raise ChildFailed(f"exit status {child.returncode}: {processes.tail(log_path)[-500:]}")
