"""Prepared files mixed into one: which rows of each, in an order that only the files and the seed decide."""

import os
import random
from pathlib import Path
from typing import Any

from trainers.folders.artifacts import write_json
from trainers.folders.cache import name_entry, published
from trainers.specs.mixture import Share, count_mixed
from trainers.tokens.prepared import INFO_FILE, ROWS_FILE, Counts, read_cached

_BATCH_ROWS = 1000


def mix(
    parts: list[tuple[Path, Counts]], shares: list[Share], *, seed: int, max_rows: int | None, cache_dir: Path
) -> tuple[Path, list[int]]:
    """(folder of the mixture in the cache, how many rows are of each part).

    A row that is taken more often than once is taken as often as any other of its file, give or take one.
    """
    taken = count_mixed([counts.used for _, counts in parts], shares)
    key = name_entry(mixture=[folder.name for folder, _ in parts], taken=taken, seed=seed, max_rows=max_rows)
    order = draw([counts.used for _, counts in parts], taken, seed=seed)[:max_rows]
    folder = cache_dir / "tokenized" / key
    if read_cached(folder) is None:
        _write(folder, [part for part, _ in parts], order=order)
    return folder, _count_by_part(order, [counts.used for _, counts in parts])


def draw(sizes: list[int], taken: list[int], *, seed: int) -> list[int]:
    """Rows, numbered through all parts: `taken` of each, shuffled. Equal arguments give an equal order."""
    order: list[int] = []
    first = 0
    for position, (size, count) in enumerate(zip(sizes, taken, strict=True)):
        chance = random.Random(f"{seed}/{position}")  # noqa: S311
        rows = range(first, first + size)
        passes, rest = divmod(count, size) if size else (0, 0)
        order += [*rows] * passes + chance.sample(rows, rest)
        first += size
    random.Random(f"{seed}/order").shuffle(order)  # noqa: S311
    return order


def _count_by_part(order: list[int], sizes: list[int]) -> list[int]:
    counts = []
    first = 0
    for size in sizes:
        counts.append(sum(first <= row < first + size for row in order))
        first += size
    return counts


def _write(folder: Path, parts: list[Path], *, order: list[int]) -> None:
    import pyarrow
    from datasets import Dataset, concatenate_datasets

    rows = concatenate_datasets([Dataset.from_file(str(part / ROWS_FILE)) for part in parts])
    rows = rows.select(order).with_format("arrow")
    counts = Counts(rows=len(order), used=len(order))
    with published(folder) as work:
        with (work / ROWS_FILE).open("wb") as file:
            with pyarrow.ipc.new_stream(file, rows.features.arrow_schema) as stream:
                table: Any
                for table in rows.iter(_BATCH_ROWS):
                    stream.write_table(table)
                    counts.tokens += sum(
                        len(table.column(name).combine_chunks().flatten())
                        for name in table.column_names
                        if name != "labels"  # one for each token
                    )
            file.flush()
            os.fsync(file.fileno())
        write_json(work / INFO_FILE, {"bytes": (work / ROWS_FILE).stat().st_size, "counts": vars(counts)})
