"""What a run reads: its training files, and another file or rows held out of them for the evaluation."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainers.folders.artifacts import digest_file
from trainers.folders.events import Events
from trainers.folders.exits import ChangedBytes, DataError
from trainers.rows.files import RowError, Rows, count_rows
from trainers.rows.formats import AnyRow
from trainers.specs import Layout, RunSpec
from trainers.specs.resolution import count_held_out


@dataclass(frozen=True)
class Part:
    """Of the rows of a file, those that are held out of the training, or the others. Rows count from 0."""

    held_out: frozenset[int]
    is_held_out: bool

    def has(self, row: int) -> bool:
        """Whether a row belongs to it."""
        return (row in self.held_out) == self.is_held_out


@dataclass(frozen=True)
class InputFile:
    """A file, how it is to be read, and how many of its rows."""

    path: Path
    layout: Layout
    max_rows: int | None = None
    part: Part | None = None
    # Which of several training files it is, from 0.
    position: int | None = None
    sha256: str = ""  # of the bytes that the check saw; empty where nobody has said

    def read(self) -> tuple[Rows, Iterator[AnyRow | RowError]]:
        """The rows, and those of them that are to be used."""
        rows = Rows(self.path, self.layout)
        return rows, self._choose(rows)

    def _choose(self, rows: Iterable[AnyRow | RowError]) -> Iterator[AnyRow | RowError]:
        """Rows that are left out have no number and count for no limit; they come with the trained ones."""
        number = taken = 0
        for row in rows:
            if isinstance(row, RowError) and self.passes_over(row):
                if self.part is None or not self.part.is_held_out:
                    yield row
                continue
            if self.part is None or self.part.has(number):
                yield row
                taken += 1
                if taken == self.max_rows:
                    return
            number += 1

    def count(self) -> int:
        """How many rows there are to choose from."""
        if not self.layout.max_invalid_fraction:
            return count_rows(self.path, self.layout)
        rows = Rows(self.path, self.layout)
        return sum(not (isinstance(row, RowError) and self.passes_over(row)) for row in rows)

    def passes_over(self, error: RowError) -> bool:
        """Whether a row is to be left out: what its check has found is within what its owner tolerates."""
        return self.layout.max_invalid_fraction > 0 and not error.ends_file

    def locate(self, line: int) -> str:
        """Where a line is, for messages to users."""
        return f"line {line}" if self.position is None else f"training_files.{self.position}, line {line}"

    def fault(self, row: RowError) -> DataError:
        """What a row that cannot be used means for the run."""
        message = f"{self.locate(row.line)}: {row.message}"
        return DataError(message, line=row.line, position=self.position)

    def digest(self) -> str:
        """The sha256 of its bytes. Raises ChangedBytes where it is not what it should be."""
        content = digest_file(self.path)
        if self.sha256 and content != self.sha256:
            raise ChangedBytes(
                f"the stored bytes of {self.path.name} have changed on the disk since they were uploaded: "
                "upload the file again"
            )
        return content

    def name_facts(self) -> dict[str, Any]:
        """What decides which rows are read: a part of the name of what is made of them.

        Raises ChangedBytes.
        """
        content = self.digest()
        part = self.part and [self.part.is_held_out, sorted(self.part.held_out)]
        return {
            "content": content,
            "layout": self.layout.name_facts(),
            "max_rows": self.max_rows,
            "part": part,
        }


def choose_inputs(spec: RunSpec, *, events: Events) -> tuple[list[InputFile], list[InputFile]]:
    """What is trained on, and what is evaluated, if anything. Raises DataError."""
    settings = spec.settings()
    if spec.mixture:
        # How many rows of a mixture are used is decided when it is mixed.
        train = [
            InputFile(part.path, part.layout, position=i, sha256=part.sha256)
            for i, part in enumerate(spec.mixture)
        ]
    else:
        limit = settings.max_train_samples
        train = [InputFile(spec.train_file, spec.train_layout, limit, sha256=spec.train_sha256)]
    if spec.validation_file:
        held_out = InputFile(
            spec.validation_file,
            spec.validation_layout,
            settings.max_eval_samples,
            sha256=spec.validation_sha256,
        )
        return train, [held_out]
    if not settings.validation_split and not settings.validation_split_percentage:
        return train, []
    parts = [_hold_out(file, spec=spec, events=events) for file in train]
    return [kept for kept, _ in parts], [held_out for _, held_out in parts]


def _hold_out(file: InputFile, *, spec: RunSpec, events: Events) -> tuple[InputFile, InputFile]:
    settings = spec.settings()
    n_rows = file.count()
    n_held_out = count_held_out(n_rows, settings)
    if n_held_out < 1 or (settings.validation_split or 0) >= n_rows:
        asked = "validation_split" if settings.validation_split else "validation_split_percentage"
        where = "the training file" if file.position is None else f"training_files.{file.position}"
        raise DataError(f"{asked}: {where} has too few rows to hold any out ({n_rows})")
    # Rows, not what is made of them: neither a document nor a pair of answers is on both sides.
    held_out = frozenset(random.Random(spec.seed).sample(range(n_rows), n_held_out))  # noqa: S311
    events.message(
        f"{n_held_out} of {n_rows} rows are held out for validation",
        code="held_out",
        rows=n_held_out,
        of=n_rows,
    )
    kept = replace(file, part=Part(held_out, is_held_out=False))
    return kept, replace(kept, max_rows=settings.max_eval_samples, part=Part(held_out, is_held_out=True))
