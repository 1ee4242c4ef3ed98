"""Model and adapter folders as artifacts: digests, durable writes, refusals, reports (no torch)."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REFUSED_EXIT = 3
_CHUNK_BYTES = 1 << 20


class Refused(ValueError):
    """The input may not become an artifact. `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def digest_file(path: Path) -> str:
    """sha256 of one file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_folder(folder: Path) -> str:
    """sha256 over the sorted lines `<relative posix name>\\0<sha256 of the bytes>\\n` of the folder's files.

    Names and bytes count; times, owners and the order of the directory do not.
    """
    digest = hashlib.sha256()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        digest.update(f"{name}\0{digest_file(folder / name)}\n".encode())
    return digest.hexdigest()


def count_bytes(folder: Path) -> int:
    """Bytes held by the files of `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe_model(folder: Path) -> dict[str, Any]:
    """`model_type`, `context_length` in tokens, `vocab_size` and `parameters` of a model that was saved."""
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_bytes())
    of_text = config.get("text_config") or config
    parameters = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            parameters += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return {
        "model_type": config["model_type"],
        "context_length": of_text.get("max_position_embeddings"),
        "vocab_size": of_text.get("vocab_size"),
        "parameters": parameters,
    }


def publish_folder(work_dir: Path, target: Path) -> None:
    """Rename a finished folder to its final name, after its bytes are on disk."""
    for path in [*work_dir.rglob("*"), work_dir]:
        if path.is_file():
            path.chmod(0o644)  # save_pretrained leaves 0600, and an engine may run as another user
        _flush(path)
    work_dir.rename(target)
    _flush(target.parent)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write the JSON file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    _flush(temporary)
    temporary.replace(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def report_outcome(work: Callable[[], dict[str, Any]], *, to: Path) -> int:
    """Write what `work` reports, or why it refused, to the file `to`; the exit status for the shell."""
    try:
        report = work()
    except Refused as refused:
        write_json(to, {"error": {"code": refused.code, "message": str(refused)}})
        sys.stderr.write(f"{refused.code}: {refused}\n")
        return REFUSED_EXIT
    write_json(to, report)
    return 0
