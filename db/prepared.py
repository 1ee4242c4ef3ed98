"""Prepared data: folders of the cache that runs make and share, seen, and collected when none uses them."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.models import Job

_KINDS = ("tokenized", "tokenizers")
_LEFT = ".tmp"  # what a killed trainer, or a removal that was cut short, has left
_LEFT_S = 24 * 3600.0


@dataclass(frozen=True)
class PreparedData:
    """Rows as token ids. `id` names all that decides them; `used_at` is Unix seconds."""

    id: str
    bytes: int
    rows: int
    tokens: int
    used_at: float


def list_prepared(cache_dir: Path) -> list[PreparedData]:
    """All that is there and whole, latest use first."""
    found = []
    for folder in _folders(cache_dir / "tokenized"):
        try:
            counts = json.loads((folder / "info.json").read_bytes())["counts"]
            size = sum(file.stat().st_size for file in folder.iterdir())
            used_at = folder.stat().st_mtime
        except FileNotFoundError:
            continue  # on its way in or out
        found.append(PreparedData(folder.name, size, counts["used"], counts["tokens"], used_at))
    return sorted(found, key=lambda one: (-one.used_at, one.id))


def collect(session: Session, cache_dir: Path, *, runs_dir: Path, unused_s: float) -> list[str]:
    """Remove what no run has used for `unused_s` seconds and no running job reads; the names of it."""
    now = time.time()
    read_now = _read_by_running(session, runs_dir)
    removed = []
    for kind in _KINDS:
        for folder in _folders(cache_dir / kind, also_left=True):
            left = folder.name.endswith(_LEFT)
            try:
                is_old = now - folder.stat().st_mtime > (_LEFT_S if left else unused_s)
                if not is_old or str(folder) in read_now:
                    continue
                # Another name first: who looks for it finds all of it or nothing.
                going = folder if left else folder.rename(folder.with_name(f"{folder.name}.going{_LEFT}"))
            except FileNotFoundError:
                continue  # somebody else was faster
            shutil.rmtree(going, ignore_errors=True)
            removed.append(folder.name)
    return removed


def _folders(parent: Path, *, also_left: bool = False) -> Iterator[Path]:
    if parent.is_dir():
        yield from (path for path in parent.iterdir() if also_left or not path.name.endswith(_LEFT))


def _read_by_running(session: Session, runs_dir: Path) -> set[str]:
    """The folders that attempts of running jobs were given."""
    folders: set[str] = set()
    for job_id in session.scalars(select(Job.id).where(Job.status == "running")):
        for path in (runs_dir / job_id).glob("*/prepared.json"):
            given = json.loads(path.read_bytes())
            folders |= {given[name] for name in ("train", "validation", "tokenizer") if given.get(name)}
    return folders
