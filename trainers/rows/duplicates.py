"""Rows that a file holds more than once, found in twelve bytes a row."""

import json
from array import array
from collections.abc import Iterable
from itertools import repeat
from typing import Any

from xxhash import xxh3_64_intdigest

from trainers.rows.containers import Record

_N_PARTS = 16  # each is sorted alone, so that only a part of the rows is in memory twice
_SEED = 0x7E51DE


def digest_record(record: Record) -> int:
    """64 bits of what a row was read from; white space around it is no part of it."""
    data = record.strip() if isinstance(record, bytes) else json.dumps(record, default=str).encode()
    return xxh3_64_intdigest(data, _SEED)


def digest_lines(lines: Iterable[bytes]) -> list[int]:
    """The same of many lines."""
    return list(map(xxh3_64_intdigest, map(bytes.strip, lines), repeat(_SEED)))


class Duplicates:
    """Collects the digests of rows.

    Rows are not compared: of n different ones, some two have the same digest with odds of n² / 2⁶⁵, which is
    3 in 100 million for a million rows.
    """

    def __init__(self) -> None:
        self._digests, self._lines = array("Q"), array("I")

    def add(self, digest: int, *, line: int) -> None:
        """Note a row."""
        self._digests.append(digest)
        self._lines.append(line)

    def extend(self, digests: Iterable[int], lines: Iterable[int]) -> None:
        """Note many rows."""
        self._digests.extend(digests)
        self._lines.extend(lines)

    def append(self, later: "Duplicates", *, n_lines: int) -> None:
        """Join those of rows that come after so many lines."""
        self._digests.extend(later._digests)
        self._lines.extend(line + n_lines for line in later._lines)

    def summarize(self, *, n_first: int) -> dict[str, Any]:
        """{"count": rows that were there before, "first": [{"line", "same_as": where it was first}]}."""
        import numpy as np

        digests, lines = np.frombuffer(self._digests, "u8"), np.frombuffer(self._lines, "u4")
        parts = digests % np.uint64(_N_PARTS)
        count = 0
        found: list[list[int]] = []
        for part in range(_N_PARTS):
            mine = np.flatnonzero(parts == part)
            order = mine[np.lexsort((lines[mine], digests[mine]))]
            again = np.flatnonzero(digests[order[1:]] == digests[order[:-1]]) + 1
            count += len(again)
            # Of those that are equal, the first is the last place before that is not one of `again`.
            firsts = np.setdiff1d(np.arange(len(order)), again, assume_unique=True)
            same_as = firsts[np.searchsorted(firsts, again) - 1]
            pairs = np.stack((lines[order[again]], lines[order[same_as]]), axis=1)
            found += pairs[np.argsort(pairs[:, 0])[:n_first]].tolist()
        first = sorted(found)[:n_first]
        return {"count": count, "first": [{"line": line, "same_as": same_as} for line, same_as in first]}
