"""Rows that a file holds more than once, found in twelve bytes a row."""

import heapq
import json
from array import array
from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_64_intdigest

from trainers.containers import Record

_N_BUCKETS = 256  # each is looked through alone, so that only a part of the rows is in a dict at a time
_SEED = 0x7E51DE


def digest_record(record: Record) -> int:
    """64 bits of what a row was read from; white space around it is no part of it."""
    data = record.strip() if isinstance(record, bytes) else json.dumps(record, default=str).encode()
    return xxh3_64_intdigest(data, _SEED)


class Duplicates:
    """Collects the digests of rows.

    Rows are not compared: of n different ones, some two have the same digest with odds of n² / 2⁶⁵, which is
    3 in 100 million for a million rows.
    """

    def __init__(self) -> None:
        self._digests = [array("Q") for _ in range(_N_BUCKETS)]
        self._lines = [array("I") for _ in range(_N_BUCKETS)]

    def add(self, digest: int, *, line: int) -> None:
        """Note a row; lines come in their order."""
        bucket = digest % _N_BUCKETS
        self._digests[bucket].append(digest)
        self._lines[bucket].append(line)

    def append(self, later: "Duplicates", *, n_lines: int) -> None:
        """Join those of rows that come after so many lines."""
        for bucket in range(_N_BUCKETS):
            self._digests[bucket].extend(later._digests[bucket])
            self._lines[bucket].extend(line + n_lines for line in later._lines[bucket])

    def summarize(self, *, n_first: int) -> dict[str, Any]:
        """{"count": rows that were there before, "first": [{"line", "same_as": where it was first}]}."""
        count = 0

        def counted() -> Iterator[tuple[int, int]]:
            nonlocal count
            for pair in self._find():
                count += 1
                yield pair

        first = heapq.nsmallest(n_first, counted())
        return {"count": count, "first": [{"line": line, "same_as": same_as} for line, same_as in first]}

    def _find(self) -> Iterator[tuple[int, int]]:
        for digests, lines in zip(self._digests, self._lines, strict=True):
            seen: dict[int, int] = {}
            for digest, line in zip(digests, lines, strict=True):
                if digest in seen:
                    yield line, seen[digest]
                else:
                    seen[digest] = line
