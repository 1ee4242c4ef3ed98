"""Prepared files in the cache: token ids as Arrow, what was counted of them, and a name that says it all."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from trainers.tokens.examples import Example

ROWS_FILE = "rows.arrow"
INFO_FILE = "info.json"
_LISTED_LINES = 20
_SUMMED = ("rows", "used", "dropped", "refused", "truncated", "blank_lines", "tokens", "trainable_tokens")


@dataclass
class Counts:
    """What became of the rows of a file. Without a token to train on a row is dropped."""

    rows: int = 0
    used: int = 0
    dropped: int = 0
    dropped_lines: list[int] = field(default_factory=list)  # the first of them
    refused: int = 0  # rows that are wrong and may be left out
    refused_lines: list[int] = field(default_factory=list)  # the first of them
    truncated: int = 0
    blank_lines: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    longest: int = 0  # tokens of the longest row before truncation

    def refuse(self, line: int) -> None:
        """Counts a row that is wrong and may be left out."""
        self.refused += 1
        if len(self.refused_lines) < _LISTED_LINES:
            self.refused_lines.append(line)

    def add(self, example: Example) -> bool:
        """Counts an example; False when there is nothing in it to train on."""
        self.rows += 1
        self.longest = max(self.longest, example.full_length)
        self.truncated += example.was_cut
        if not example.n_trainable:
            self.dropped += 1
            if len(self.dropped_lines) < _LISTED_LINES:
                self.dropped_lines.append(example.line)
            return False
        self.used += 1
        self.tokens += example.n_tokens
        self.trainable_tokens += example.n_trainable
        return True


def read_cached(folder: Path) -> Counts | None:
    """The counts of a cached file, or None when it is absent or not whole."""
    try:
        info = json.loads((folder / INFO_FILE).read_bytes())
        if (folder / ROWS_FILE).stat().st_size != info["bytes"]:
            shutil.rmtree(folder)
            return None
    except FileNotFoundError:
        return None
    os.utime(folder)  # its age tells whoever clears the cache what is in use
    return Counts(**info["counts"])


def add_counts(parts: list[Counts]) -> Counts:
    """What became of the rows of several files together."""
    total = Counts()
    for part in parts:
        for name in _SUMMED:
            setattr(total, name, getattr(total, name) + getattr(part, name))
        total.longest = max(total.longest, part.longest)
    return total
