"""Checks a training file: `python -m trainers.validate FILE [--layout JSON] --report OUT.json`.

Errors in the data are findings, so they go into the report and the exit status is 0. The report has the
`sha256` of the bytes too.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from trainers.artifacts import digest_file, write_json
from trainers.containers import Span, split_file
from trainers.faults import Unreadable
from trainers.findings import Findings
from trainers.rows import RowError, Rows
from trainers.specs.layouts import Layout

_SPAWN = get_context("spawn")
_PART_BYTES = 64 << 20  # at least: a process costs more than it saves on less


def check_file(path: Path, layout: Layout, *, n_processes: int = 1) -> dict[str, Any]:
    """What is in a file, and what is wrong with it, in memory that only the number of its rows adds to.

    {rows, rows_used, rows_refused, blank_lines, format, kind, whole, max_invalid_fraction, accepted,
    reasons: {code: count}, errors: [{line, code, message}], notices: {code: {count, lines}},
    duplicates: {count, first}, sample}. Every row is used or refused, unless the file is not `whole`: then
    reading ended early. The report is the same for every number of processes.
    """
    spans = _split(path, layout, n_parts=n_processes)
    found = _collect_side_by_side(path, layout, spans) if len(spans) > 1 else Findings()
    if not found.n_rows:
        found = Findings().collect(Rows(path, layout))
    return found.summarize(max_invalid_fraction=layout.max_invalid_fraction)


def _split(path: Path, layout: Layout, *, n_parts: int) -> list[Span]:
    if layout.container != "jsonl" or layout.gzip or n_parts < 2:
        return []
    try:
        return split_file(path, n_parts=n_parts)
    except Unreadable:
        return []  # to be told by who reads it


def _collect_side_by_side(path: Path, layout: Layout, spans: list[Span]) -> Findings:
    look = partial(_look, path, layout, format=_find_format(path, layout))
    with ProcessPoolExecutor(len(spans) - 1, mp_context=_SPAWN) as pool:
        later = [pool.submit(look, span) for span in spans[1:]]
        found = _look(path, layout, spans[0], format=None)
        for part in later:
            found.append(part.result())
    return found


def _find_format(path: Path, layout: Layout) -> str | None:
    """The format of the first good row, which is that of all."""
    rows = Rows(path, layout)
    next((row for row in rows if not isinstance(row, RowError)), None)
    return rows.format


def _look(path: Path, layout: Layout, span: Span, *, format: str | None) -> Findings:
    return Findings().collect(Rows(path, layout, span=span, format=format))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers.validate")
    parser.add_argument("file", type=Path)
    parser.add_argument("--layout", type=json.loads, help="a Layout as JSON; otherwise by the file's name")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args(arguments)
    layout = Layout(**options.layout) if options.layout is not None else Layout.of(options.file.name)
    n_processes = min(os.cpu_count() or 1, options.file.stat().st_size // _PART_BYTES)
    with ProcessPoolExecutor(1, mp_context=_SPAWN) as pool:
        digest = pool.submit(digest_file, options.file) if n_processes > 1 else None
        report = check_file(options.file, layout, n_processes=n_processes)
        report["sha256"] = digest.result() if digest else digest_file(options.file)
    write_json(options.report, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
