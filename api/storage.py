"""/v1/storage: what takes up the disk of the service, and how much of it is left."""

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from api.nodes import HostAdminDep
from api.schemas.nodes import StorageObject

router = APIRouter(prefix="/storage", tags=["Nodes"])

_KEPT_S = 10.0  # every file of the home is looked at, which may be many
_FOLDERS = {"blobs": "files", "models": "models", "runs": "runs", "cache": "prepared"}


class Meter:
    """What is in a home folder, measured by one thread at a time and known for ten seconds."""

    def __init__(self, home_dir: Path) -> None:
        self._home_dir = home_dir
        self._lock = threading.Lock()
        self._known: tuple[float, StorageObject] | None = None

    def read(self) -> StorageObject:
        """The newest measurement; whoever asks meanwhile waits for the same one."""
        with self._lock:
            if self._known is None or time.monotonic() - self._known[0] > _KEPT_S:
                found = _measure(self._home_dir)
                self._known = time.monotonic(), found
            return self._known[1]


def get_meter(request: Request) -> Meter:
    """The meter of the app."""
    return request.app.state.storage


@router.get("", summary="Retrieve storage")
def retrieve_storage(_caller: HostAdminDep, meter: Annotated[Meter, Depends(get_meter)]) -> StorageObject:
    """What files, models, runs and prepared data take up, and what is free (admins of the host)."""
    return meter.read()


def _measure(home_dir: Path) -> StorageObject:
    sizes = dict.fromkeys([*_FOLDERS.values(), "other"], 0)
    seen: set[tuple[int, int]] = set()
    for entry in _entries(home_dir):
        name = _FOLDERS.get(entry.name, "other")
        sizes[name] += _size_bytes(entry, seen)
    disk = shutil.disk_usage(home_dir)
    return StorageObject(
        measured_at=int(time.time()),
        files_bytes=sizes["files"],
        prepared_bytes=sizes["prepared"],
        models_bytes=sizes["models"],
        runs_bytes=sizes["runs"],
        other_bytes=sizes["other"],
        free_bytes=disk.free,
        total_bytes=disk.total,
    )


def _size_bytes(entry: os.DirEntry[str], seen: set[tuple[int, int]]) -> int:
    """Of a file, or of all files below a folder; links lead nowhere, and a file of two names counts once."""
    if entry.is_dir(follow_symlinks=False):
        return sum(_size_bytes(inner, seen) for inner in _entries(entry.path))
    try:
        stat = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # removed a moment ago
        return 0
    if stat.st_nlink > 1:
        if (stat.st_dev, stat.st_ino) in seen:
            return 0
        seen.add((stat.st_dev, stat.st_ino))
    return stat.st_size


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []
