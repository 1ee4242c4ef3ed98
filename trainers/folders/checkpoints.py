"""Checkpoints that are complete or invisible: manifest last, renamed into place, verified before use."""

import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
MANIFEST_VERSION = 1
_STEP_DIR = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    manifest: dict[str, Any]
    manifest_sha256: str


@dataclass(frozen=True)
class Corrupt:
    path: Path
    problem: str


def stage(root: Path, *, step: int) -> Path:
    """The empty folder a checkpoint is written in, invisible to readers until it is sealed."""
    folder = root / f"step-{step}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def seal(staged: Path, *, step: int, attempt: int, world_size: int, **facts: Any) -> Checkpoint:
    """Makes a staged folder a checkpoint: files to disk, manifest last, then the name.

    A crash at any point leaves either the whole checkpoint or none; the folder of an earlier
    attempt at the same step is replaced.
    """
    files = [_describe(path, root=staged) for path in sorted(staged.rglob("*")) if path.is_file()]
    body = {
        "version": MANIFEST_VERSION,
        "step": step,
        "attempt": attempt,
        "world_size": world_size,
        "created_at": time.time(),
        **facts,
        "files": files,
    }
    manifest = {**body, "self_sha256": _digest_json(body)}
    data = json.dumps(manifest, indent=1).encode()
    with (staged / MANIFEST).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    for folder in [path for path in staged.rglob("*") if path.is_dir()]:
        sync(folder)
    sync(staged)
    target = staged.with_name(f"step-{step}")
    if target.exists():
        # Only a rerun that refused this one comes here: an older checkpoint covers the gap.
        replaced = target.with_name(f"step-{step}.old.tmp")
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        staged.rename(target)
        shutil.rmtree(replaced)
    else:
        staged.rename(target)
    sync(target.parent)
    return Checkpoint(target, step, manifest, hashlib.sha256(data).hexdigest())


def verify(path: Path) -> Checkpoint | Corrupt:
    """Reads every byte of a checkpoint and compares it with the manifest."""
    try:
        data = (path / MANIFEST).read_bytes()
        manifest = _read_object(data)
        if manifest is None:
            return Corrupt(path, f"{MANIFEST} is damaged")
        body = {name: value for name, value in manifest.items() if name != "self_sha256"}
        if manifest.get("self_sha256") != _digest_json(body):
            return Corrupt(path, f"{MANIFEST} is damaged")
        if body["version"] != MANIFEST_VERSION:
            return Corrupt(path, f"{MANIFEST} has version {body['version']}, not {MANIFEST_VERSION}")
        if path.name != f"step-{body['step']}":
            return Corrupt(path, f"the manifest is of step {body['step']}")
        for entry in body["files"]:
            problem = _compare(path / entry["path"], entry)
            if problem:
                return Corrupt(path, f"{entry['path']} {problem}")
        extra = {item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()}
        extra -= {MANIFEST, *(entry["path"] for entry in body["files"])}
        if extra:
            return Corrupt(path, f"{min(extra)} is not in {MANIFEST}")
    except FileNotFoundError as error:
        return Corrupt(path, f"{Path(error.filename).name} is missing")
    except OSError as error:
        return Corrupt(path, f"cannot be read: {error}")
    return Checkpoint(path, body["step"], manifest, hashlib.sha256(data).hexdigest())


def find_damage(path: Path, *, manifest_sha256: str | None) -> str | None:
    """What is wrong with a checkpoint that was sealed under a manifest of this sum; None if nothing is.

    Without the sum, what its own manifest says counts, and a folder that has none is no checkpoint.
    """
    if manifest_sha256 is None and not (path / MANIFEST).exists():
        return None
    found = verify(path)
    if isinstance(found, Corrupt):
        return found.problem
    if manifest_sha256 not in (None, found.manifest_sha256):
        return f"{MANIFEST} is of another checkpoint"
    return None


def latest_valid(roots: list[Path]) -> tuple[Checkpoint | None, list[Corrupt]]:
    """The furthest checkpoint whose every byte is as it was written, and the broken ones passed over.

    Of two at the same step the one under the earlier root counts: roots are given newest attempt first.
    """
    found = [
        (-step, order, path) for order, root in enumerate(roots) for step, path in list_checkpoints(root)
    ]
    corrupt = []
    for _, _, path in sorted(found):
        result = verify(path)
        if isinstance(result, Checkpoint):
            return result, corrupt
        corrupt.append(result)
    return None, corrupt


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, path) of the folders that claim to be checkpoints, oldest step first; nothing is verified."""
    if not root.is_dir():
        return []
    named = [(match, path) for path in root.iterdir() if (match := _STEP_DIR.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in named if path.is_dir())


def rotate(root: Path, *, keep: int) -> list[Path]:
    """Deletes all but the `keep` newest; call it only once the newest is sealed. Returns what was deleted."""
    surplus = [path for _, path in list_checkpoints(root)][:-keep]
    for path in surplus:
        doomed = path.with_name(path.name + ".del.tmp")  # so that a crash leaves no half-deleted checkpoint
        path.rename(doomed)
        shutil.rmtree(doomed)
    return surplus


def clear_leftovers(root: Path) -> None:
    """Removes what a killed writer left behind. Only the owner of the folder may call it."""
    if root.is_dir():
        for path in root.glob("*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(path: Path, *, root: Path) -> dict[str, Any]:
    sync(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": digest}


def _compare(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file, or None."""
    size_bytes = path.stat().st_size
    if size_bytes != entry["bytes"]:
        return f"has {size_bytes} bytes, not {entry['bytes']}"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            return "does not match its sha256"
    return None


def _read_object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _digest_json(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
