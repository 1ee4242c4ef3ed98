"""Content-addressed bytes on disk: stream in, sha256, fsync, rename. Once per tenant and content."""

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from sqlalchemy.orm import Session

from db.errors import Corrupt
from db.session import Database, lock_digest

_READ_BYTES = 1 << 20
_FLUSH_BYTES = 32 << 20
_ABANDONED_S = 3600.0


class BlobWriter:
    """Bytes on their way in. Leaves nothing behind unless `keep` was called."""

    def __init__(self, root: Path, org_id: str) -> None:
        self._root, self._org_id = root, org_id
        self._hash = hashlib.sha256()
        self.size_bytes = self._flushed_bytes = 0
        incoming = root / "incoming"
        incoming.mkdir(parents=True, exist_ok=True)
        self._temp = incoming / secrets.token_hex(16)
        self._out = self._temp.open("xb")

    def __enter__(self) -> "BlobWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()
        self._temp.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """Append `chunk`. Raises OSError (ENOSPC) when the disk is full."""
        self._out.write(chunk)
        self._hash.update(chunk)
        self.size_bytes += len(chunk)
        if self.size_bytes - self._flushed_bytes >= _FLUSH_BYTES:
            self._start_flush()

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._hash.hexdigest()

    def _start_flush(self) -> None:
        """Have the kernel begin to write what it was given, so that `sync` waits for the last part only.

        The advice drops pages that are clean, and these are not.
        """
        n_bytes = self.size_bytes - self._flushed_bytes
        os.posix_fadvise(self._out.fileno(), self._flushed_bytes, n_bytes, os.POSIX_FADV_DONTNEED)
        self._flushed_bytes = self.size_bytes

    def sync(self) -> None:
        """Put the bytes on disk. Call before `keep`, outside any transaction: it is slow."""
        self._out.flush()
        os.fsync(self._out.fileno())

    def keep(self, target: Path | None = None) -> None:
        """Give the bytes their final name, by default `path_of` their digest.

        Call inside the transaction that records them, under a lock that keeps removers of that name away.
        """
        target = target or path_of(self._root, self._org_id, self.sha256)
        folder = target.parent
        is_new = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(self._temp, target)
        for changed in (folder, folder.parent, self._root) if is_new else (folder,):
            _sync_folder(changed)


def path_of(root: Path, org_id: str, sha256: str) -> Path:
    """Where the bytes with this digest lie; nothing of it comes from a client's text."""
    return root / org_id / sha256[:2] / sha256


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a blob, 1 MiB at a time."""
    with path.open("rb") as source:
        while chunk := source.read(_READ_BYTES):
            yield chunk


def read_as_stored(path: Path, *, sha256: str, chunk_bytes: int = _READ_BYTES) -> Iterator[bytes]:
    """The bytes of a blob; the last chunk only if all have the digest. Raises `Corrupt`."""
    digest = hashlib.sha256()
    held = None
    with path.open("rb") as source:
        while chunk := source.read(chunk_bytes):
            if held is not None:
                yield held
            digest.update(chunk)
            held = chunk
    if held is None or digest.hexdigest() != sha256:
        raise Corrupt(describe_change(sha256))
    yield held


def check_size(path: Path, *, size_bytes: int) -> None:
    """Whether a blob is there, and as long as it was. Raises `Corrupt`."""
    if not path.is_file() or path.stat().st_size != size_bytes:
        raise Corrupt(describe_change(path.name))


def describe_change(sha256: str) -> str:
    """What is said of bytes that are not as they were stored."""
    return f"The stored bytes with the SHA-256 digest {sha256} are gone or have changed on the disk."


def sweep(root: Path) -> None:
    """Remove what writers left that were killed: nobody who lives is silent for an hour."""
    for path in (root / "incoming").glob("*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _ABANDONED_S:
                path.unlink()


@contextmanager
def locked(database: Database, sha256: str) -> Iterator[Session]:
    """A write transaction that excludes every other keeper or remover of the same content."""
    with database.write() as session:
        lock_digest(session, sha256)
        yield session


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
