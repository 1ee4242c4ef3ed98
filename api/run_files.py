"""The files of a run, under the names that users of training scripts know. Nothing here speaks HTTP."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CHECKPOINT = re.compile(r"checkpoints/step-(\d+)/(.+)")
_MANIFEST = "MANIFEST.json"  # a checkpoint is complete when it has one
_LOG = "log.txt"
_LOG_PIECE_BYTES = 1024 * 1024
_LOGS = {_LOG: "logs/train.log", "merge.log": "logs/merge.log"}
_METRICS = ("trainer_state.json", "train_results.json", "eval_results.json", "evaluation.json")
_MODEL = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class RunFile:
    """A file of a run; `name` is what clients call it, `stat` how it was when it was found."""

    name: str
    kind: str
    path: str
    stat: os.stat_result


def newest_attempt(job_dir: Path) -> int:
    """The number of the newest attempt that has a folder; 0 when none has."""
    if not job_dir.is_dir():
        return 0
    return max((int(entry.name) for entry in job_dir.iterdir() if entry.name.isdecimal()), default=0)


def list_run_files(run_dir: Path) -> list[RunFile]:
    """What clients may have of an attempt's folder, by name. Empty when there is no such folder."""
    there = dict(walk_files(run_dir))
    found = []
    for place, entry in there.items():
        known_as = _name(place, there)
        if known_as is not None:
            try:
                stat = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            found.append(RunFile(*known_as, path=entry.path, stat=stat))
    return sorted(found, key=lambda file: file.name)


def walk_files(folder: Path | str, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Regular files below `folder` by name. Links are not followed: they could lead out of it."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return  # no run yet, or a checkpoint that makes room for a newer one at this moment
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(entry.path, f"{prefix}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            yield prefix + entry.name, entry


def _name(place: str, there: dict[str, os.DirEntry[str]]) -> tuple[str, str] | None:
    """The name and kind of the file at `place` in the folder; None for what is not to be had."""
    if place in _LOGS:
        return _LOGS[place], "log"
    if checkpoint := _CHECKPOINT.fullmatch(place):
        step, rest = checkpoint.groups()
        complete = f"checkpoints/step-{step}/{_MANIFEST}" in there
        return (f"checkpoint-{step}/{rest}", "checkpoint") if complete else None
    folder, _, rest = place.partition("/")
    if folder == "tensorboard" and rest:
        return f"runs/{rest}", "tensorboard"
    if folder == "output" and rest:
        return rest, _kind_of(rest)
    return None


def _kind_of(name: str) -> str:
    """The kind of a file of a run's output."""
    if name.startswith("adapter_"):
        return "adapter"
    if name in _METRICS:
        return "metrics"
    # All weights were trained, and there is no adapter.
    return "model" if name.startswith("model") or name in _MODEL else "tokenizer"


def read_log_piece(run_dir: Path, *, offset_bytes: int) -> bytes:
    """What an attempt's trainer printed from there on, at most 1 MiB of whole characters."""
    try:
        with (run_dir / _LOG).open("rb") as log:
            log.seek(offset_bytes)
            return _whole_characters(log.read(_LOG_PIECE_BYTES))
    except FileNotFoundError:  # nothing was printed yet
        return b""


def _whole_characters(text: bytes) -> bytes:
    """`text` without a UTF-8 character that is cut off at its end."""
    for size in range(1, min(3, len(text)) + 1):
        byte = text[-size]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
            needed = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return text[:-size] if needed > size else text
        if byte < 0x80:
            return text
    return text
