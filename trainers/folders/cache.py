"""Folders that are made once, named by all that decides what is in them, and shared by runs."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainers.folders.artifacts import digest_file
from trainers.folders.checkpoints import sync

CODE_VERSION = 5  # raise it when the same input would give something else
# What decides how text becomes tokens, and which tokens end a turn.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "generation_config.json",
)


def name_entry(**facts: Any) -> str:
    """The name of what these facts decide."""
    key = {"code": CODE_VERSION, **facts}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def digest_tokenizer(folder: Path) -> dict[str, str]:
    """sha256 of each file that belongs to the tokenizer in a folder."""
    names = {file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return {file.name: digest_file(file) for file in sorted(names)}


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name once it is whole."""
    work = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    work.mkdir(parents=True)
    try:
        yield work
        for path in [*work.iterdir(), work]:
            sync(path)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run made the same meanwhile
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
