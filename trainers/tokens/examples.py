"""What a method trains on: columns of token ids, and what is counted of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Example:
    """One row of prepared data. Without a trainable token it is left out."""

    line: int
    columns: dict[str, list[int]]
    n_tokens: int
    n_trainable: int
    full_length: int  # tokens of the longest text in it, before anything was cut
    was_cut: bool = False

    def __getattr__(self, name: str) -> Any:
        if name != "columns" and name in self.columns:
            return self.columns[name]
        raise AttributeError(name)


class Encoder(Protocol):
    """Turns rows into examples; part of what the cache of prepared data is keyed by."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of an example's columns."""
        ...

    def encode(self, rows: list[Any]) -> Iterator[Example]:
        """The examples of a batch of rows, in order."""
        ...

    def finish(self) -> Iterator[Example]:
        """What was held back until the last row had come."""
        ...
