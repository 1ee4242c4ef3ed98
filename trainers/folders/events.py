"""RUN_DIR/events.jsonl: what a run says while it runs, one JSON object a line; in words, to its log too."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import IO, Any, Literal

Phase = Literal["preparing", "loading", "training", "evaluating", "saving"]
Level = Literal["info", "warn", "error"]
_LEVELS = {"info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}

log = logging.getLogger(__name__)


class Events:
    """Appends to events.jsonl, a flushed line each. Without a path (every rank but the first) it is mute."""

    def __init__(self, path: Path | None):
        self._file: IO[bytes] | None = None
        self._phase: str | None = None
        if path is not None:
            self._file = path.open("ab", buffering=0)
            _end_torn_line(path, self._file)

    def phase(self, phase: Phase) -> None:
        """The same phase twice in a row is written once."""
        if phase != self._phase:
            self._phase = phase
            self._write("phase", phase=phase)

    def message(self, text: str, *, level: Level = "info", **data: Any) -> None:
        self._write("message", level=level, message=text, data=data)
        if self._file:
            log.log(_LEVELS[level], "%s", text)

    def metrics(self, step: int, *, total_steps: int, data: dict[str, Any]) -> None:
        """Numbers of one step; those that are not finite become null, and a warning says so."""
        clean = drop_nonfinite(data)
        self._write("metrics", step=step, total_steps=total_steps, data=clean)
        if self._file:
            told = ", ".join(
                f"{name} {value:.5g}" for name, value in clean.items() if isinstance(value, int | float)
            )
            log.info("step %d of %d: %s", step, total_steps, told)
        lost = [name for name in data if clean[name] is None and data[name] is not None]
        if lost:
            self.message(
                f"step {step}: {', '.join(lost)} is not a finite number",
                level="warn",
                code="nonfinite_metric",
            )

    def checkpoint(self, step: int, *, path: str, manifest_sha256: str, metrics: dict[str, Any]) -> None:
        self._write(
            "checkpoint",
            step=step,
            path=path,
            manifest_sha256=manifest_sha256,
            metrics=drop_nonfinite(metrics),
        )

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _write(self, kind: str, **fields: Any) -> None:
        if self._file:
            line = json.dumps({"ts": time.time(), "type": kind, **fields}, allow_nan=False)
            self._file.write(line.encode() + b"\n")  # unbuffered and in one call: readers see whole lines


def drop_nonfinite(data: dict[str, Any]) -> dict[str, Any]:
    """The same numbers with NaN and infinities as None, which JSON can carry."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in data.items()
    }


def _end_torn_line(path: Path, file: IO[bytes]) -> None:
    """A writer killed in mid-line must not swallow the first line of its successor."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as reader:
        reader.seek(-1, os.SEEK_END)
        if reader.read(1) != b"\n":
            file.write(b"\n")
