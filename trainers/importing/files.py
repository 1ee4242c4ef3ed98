"""Copies what may be near a model out of an untrusted folder: regular, allow-listed files, nothing else."""

import os
import shutil
import stat
from pathlib import Path

from trainers.folders.artifacts import Refused
from trainers.importing.checks import (
    PICKLED_SUFFIXES,
    SETTINGS_LIMIT_BYTES,
    SETTINGS_NAMES,
    TEMPLATES_FOLDER,
    VOCABULARY_LIMIT_BYTES,
    VOCABULARY_NAMES,
)


def refuse_unsafe_files(source: Path) -> None:
    """Refuse links and files that can hold code, anywhere below `source`."""
    if not source.is_dir() or source.is_symlink():
        raise Refused("not_a_model", "The source is neither a folder nor a .gguf file.")
    for path in sorted(source.rglob("*")):
        if path.is_symlink():
            raise Refused("symlink", f"{path.relative_to(source)} is a symbolic link; copy the file itself.")
        if path.suffix.lower() in PICKLED_SUFFIXES:
            raise Refused(
                "unsafe_weights", f"{path.name} can hold code; only safetensors weights are accepted."
            )


def copy_allowed_files(source: Path, target: Path) -> None:
    """Copy weights, settings and tokenizer; everything else stays behind."""
    for path in sorted(source.iterdir()):
        if path.name in SETTINGS_NAMES:
            _copy_file(path, target / path.name, limit_bytes=SETTINGS_LIMIT_BYTES)
        elif path.name in VOCABULARY_NAMES or path.suffix == ".model":  # .model: sentencepiece
            _copy_file(path, target / path.name, limit_bytes=VOCABULARY_LIMIT_BYTES)
        elif path.suffix == ".safetensors":
            _copy_file(path, target / path.name, limit_bytes=None)
        elif path.name == TEMPLATES_FOLDER and path.is_dir():
            (target / path.name).mkdir()
            for template in sorted(path.glob("*.jinja")):
                _copy_file(template, target / path.name / template.name, limit_bytes=SETTINGS_LIMIT_BYTES)


def _copy_file(source: Path, target: Path, *, limit_bytes: int | None) -> None:
    try:
        # The file may have become a link or a pipe since it was looked at: neither is followed or waited for.
        handle = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Refused("not_a_model", f"{source.name} cannot be read: {error.strerror}.") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise Refused("not_a_model", f"{source.name} is not a regular file.")
    with os.fdopen(handle, "rb") as reader, target.open("wb") as writer:
        if limit_bytes is not None and found.st_size > limit_bytes:
            raise Refused("not_a_model", f"{source.name} is larger than {limit_bytes >> 20} MiB.")
        shutil.copyfileobj(reader, writer, 1 << 20)
