"""Downloads from a hub, each in a process of its own: the only one that gets the network and the token."""

import os
from pathlib import Path
from typing import Any

from db.sources import HubSource
from workers import children, processes
from workers.leases import Heartbeat

DISABLED = {"code": "hub_disabled", "message": "Imports from a hub are switched off (RESIDENCY_HUB)."}
_FORWARDED = (
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
)


def fetch_model(
    source: HubSource, *, to: Path, scratch: Path, marker: str, heartbeat: Heartbeat
) -> dict[str, Any] | None:
    """Download a model into `to`: {"revision"} or {"error"}; None when a shutdown ended it."""
    arguments = ["model", source.repo, f"--revision={source.revision}", f"--to={to}"]
    return _run(arguments, scratch=scratch, marker=marker, heartbeat=heartbeat)


def fetch_data(
    source: HubSource, *, to: Path, limit_bytes: int, scratch: Path, marker: str, heartbeat: Heartbeat
) -> dict[str, Any] | None:
    """Write a split of a data set to `to` as JSONL: {"revision", "rows"} or {"error"}; None at a shutdown."""
    arguments = ["data", source.repo, f"--revision={source.revision}", f"--to={to}"]
    arguments += [f"--split={source.split or 'train'}", f"--limit-bytes={limit_bytes}"]
    if source.config is not None:
        arguments.append(f"--config={source.config}")
    return _run(arguments, scratch=scratch, marker=marker, heartbeat=heartbeat)


def _run(arguments: list[str], *, scratch: Path, marker: str, heartbeat: Heartbeat) -> dict[str, Any] | None:
    report_path = scratch / "hub.json"
    online = {name: os.environ[name] for name in _FORWARDED if name in os.environ}
    try:
        return children.run_for_report(
            processes.module_command("trainers.hub", *arguments, f"--report={report_path}"),
            report_path=report_path,
            marker=marker,
            heartbeat=heartbeat,
            log_path=scratch / "hub.log",
            extra_env=online | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(scratch / "hf")},
        )
    except children.ChildFailed as failure:
        raise children.ChildFailed(hide_token(str(failure))) from None  # the cause would tell it after all


def hide_token(text: str) -> str:
    """`text` without the token: the end of a process' output may hold whatever a library prints."""
    token = os.environ.get("HF_TOKEN")
    return text.replace(token, "(token)") if token else text
