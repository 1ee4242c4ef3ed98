"""`python -m trainers.token_stats REQUEST.json --report OUT.json`: how many tokens the rows of a file take.

The request is that of `trainers.preview`; its row numbers are passed over.
"""

import random
import sys
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from trainers.folders.exits import DataError
from trainers.preview import Sight, answer
from trainers.rows.files import RowError, count_rows
from trainers.rows.formats import AnyRow
from trainers.tokens.examples import Example
from trainers.tokens.packing import PackingEncoder
from trainers.tokens.prepared import Counts

MAX_ROWS = 5_000  # that are encoded, in some seconds; of a longer file a sample of as many
_SEED = 0
_BATCH_ROWS = 64
_LISTED_ERRORS = 20
# Tokens; the last bucket has no end.
_BUCKETS = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072]
_PERCENTILES = (50, 90, 95, 99, 100)


@dataclass
class _Measured:
    counts: Counts = field(default_factory=Counts)
    rows: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens before anything is cut
    n_refused: int = 0
    refused: list[dict[str, Any]] = field(default_factory=list)  # the first of them

    def refuse(self, error: RowError) -> None:
        self.n_refused += 1
        if len(self.refused) < _LISTED_ERRORS:
            self.refused.append({"line": error.line, "message": error.message})


def measure(sight: Sight) -> dict[str, Any]:
    """Lengths and shares of a file, in memory that does not grow with it.

    Lengths are those of each text (of a pair, its longer one; of documents, a document with its end), before
    anything is cut. All else is counted as a job counts what it prepares: examples, which are blocks of
    documents and single answers of kto. What is refused ends a job, or is left out
    where its owner tolerates that.
    """
    n_rows = count_rows(sight.request.file, sight.request.layout)
    sampled = n_rows > MAX_ROWS
    chosen = set(random.Random(_SEED).sample(range(1, n_rows + 1), MAX_ROWS)) if sampled else None  # noqa: S311
    measured = _Measured()
    taken = (row for number, row in sight.read() if chosen is None or number in chosen)
    packs = isinstance(sight.encoder, PackingEncoder)
    while batch := list(islice(taken, _BATCH_ROWS)):
        measured.rows += len(batch)
        for row in batch:
            if isinstance(row, RowError):
                measured.refuse(row)
        good = [row for row in batch if not isinstance(row, RowError)]
        (_add_packed if packs else _add)(measured, sight, good)
    for block in sight.encoder.finish():
        measured.counts.add(block)
    told = {"rows": n_rows, "sampled": sampled, "seed": _SEED if sampled else None}
    told["measured_rows"] = min(measured.rows, n_rows)  # an empty file is an error in a row that is not there
    return sight.describe() | told | _describe(measured, has_labels=sight.learns_from != "prompt")


def _add(measured: _Measured, sight: Sight, rows: list[AnyRow]) -> None:
    for found in _encode(sight, rows):
        if isinstance(found, RowError):
            measured.refuse(found)
        else:
            measured.counts.add(found)
            measured.lengths.append(found.full_length)


def _encode(sight: Sight, rows: list[AnyRow]) -> list[Example | RowError]:
    if not rows:
        return []
    try:
        return [*sight.encoder.encode(rows)]
    except DataError:  # of one of them: the others are wanted all the same
        each = (sight.try_encode(row) for row in rows)
        return [found for one in each for found in ([one] if isinstance(one, RowError) else one)]


def _add_packed(measured: _Measured, sight: Sight, rows: list[AnyRow]) -> None:
    encoder: Any = sight.encoder
    for row in rows:
        before = encoder.tokens
        for block in encoder.encode([row]):
            measured.counts.add(block)
        measured.lengths.append(encoder.tokens - before)


def _describe(measured: _Measured, *, has_labels: bool) -> dict[str, Any]:
    counts, lengths = measured.counts, sorted(measured.lengths)
    histogram = [0] * (len(_BUCKETS) + 1)
    for length in lengths:
        histogram[bisect_left(_BUCKETS, length)] += 1
    trained = counts.trainable_tokens if has_labels else None  # of a prompt, the answer alone is trained
    return {
        "refused": measured.n_refused,
        "refused_lines": sorted(measured.refused, key=lambda fault: fault["line"]),
        "examples": counts.rows,
        "dropped": counts.dropped,
        "dropped_lines": counts.dropped_lines,
        "truncated": counts.truncated,
        "truncated_share": _share(counts.truncated, counts.rows),
        "tokens": counts.tokens,
        "trainable_tokens": trained,
        "trainable_share": None if trained is None else _share(trained, counts.tokens),
        "percentiles": {str(percent): _at(percent, lengths) for percent in _PERCENTILES if lengths},
        "histogram": [
            {"up_to": limit, "count": count}
            for limit, count in zip([*_BUCKETS, None], histogram, strict=True)
        ],
    }


def _at(percent: int, lengths: list[int]) -> int:
    """The length that so many percent of the sorted lengths do not exceed."""
    return lengths[-(-len(lengths) * percent // 100) - 1]


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def main(arguments: list[str] | None = None) -> int:
    return answer(measure, arguments, program="trainers.token_stats")


if __name__ == "__main__":
    sys.exit(main())
