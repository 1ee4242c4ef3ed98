"""Checks a training file: `python -m trainers.validate FILE [--layout JSON] --report OUT.json`.

Errors in the data are findings, so they go into the report and the exit status is 0. The report has the
`sha256` of the bytes too.
"""

import argparse
import gc
import json
import os
import resource
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trainers.folders.artifacts import digest_file, write_json
from trainers.rows.containers import Span, split_file
from trainers.rows.files import RowError, Rows, is_too_many
from trainers.rows.findings import Findings
from trainers.rows.parquet import BOUNDED_ENV
from trainers.specs.faults import Unreadable
from trainers.specs.layouts import Layout

_SPAWN = get_context("spawn")
_PART_BYTES = 64 << 20  # at least: a process costs more than it saves on less
# How a process ends over what its libraries do, rather than by somebody's will or for want of memory.
_CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV)


def check_file(path: Path, layout: Layout, *, n_processes: int = 1) -> dict[str, Any]:
    """What is in a file, and what is wrong with it, in memory that only the number of its rows adds to.

    {rows, rows_used, rows_refused, blank_lines, format, kind, whole, max_invalid_fraction, accepted,
    reasons: {code: count}, errors: [{line, code, message}], notices: {code: {count, lines}},
    duplicates: {count, first}, sample, sha256}. Every row is used or refused, unless the file is not `whole`:
    then reading ended early. The report is the same for every number of processes.
    """
    spans = _split(path, layout, n_parts=n_processes)
    if len(spans) > 1:
        return _check_side_by_side(path, layout, spans)
    found = Findings().collect(Rows(path, layout))
    return _report(found, layout) | {"sha256": digest_file(path)}


def check_apart(path: Path, layout: Layout) -> dict[str, Any]:
    """`check_file` in a process of its own, whose crash is one more thing that can be wrong with a file.

    Of some broken Parquet Arrow ends the process. Raises RuntimeError where it ended for another reason.
    """
    receiver, sender = _SPAWN.Pipe(duplex=False)
    reader = _SPAWN.Process(target=_send_report, args=(path, layout, sender), daemon=True)
    reader.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        reader.join()
    status = -(reader.exitcode or 0)
    if status not in _CRASHES:
        raise RuntimeError(f"what read the file ended with exit status {reader.exitcode}")
    name = signal.Signals(status).name
    message = f"the file is not whole {layout.container.capitalize()}: its reader crashed on it ({name})"
    found = Findings()
    found.add_error(RowError(1, message, "unreadable", ends_file=True))
    return _report(found, layout) | {"sha256": digest_file(path)}


def _send_report(path: Path, layout: Layout, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # which would hold the file's rows
    os.environ.update(BOUNDED_ENV)
    sender.send(check_file(path, layout))


def _split(path: Path, layout: Layout, *, n_parts: int) -> list[Span]:
    if layout.container != "jsonl" or layout.gzip or n_parts < 2:
        return []
    try:
        return split_file(path, n_parts=n_parts)
    except Unreadable:
        return []  # to be told by who reads it


def _check_side_by_side(path: Path, layout: Layout, spans: list[Span]) -> dict[str, Any]:
    look = partial(_look, path, layout, format=_find_format(path, layout))
    # Forked, they need not import anything; nothing here has begun a thread.
    with ProcessPoolExecutor(len(spans) - 1, mp_context=get_context("fork")) as pool:
        later = [pool.submit(look, span) for span in spans[1:]]
        digest = pool.submit(digest_file, path)  # by the first that has nothing else to do
        found = look(spans[0])
        parts = [part.result() for part in later]
        n_lines = found.n_lines + sum(part.n_lines for part in parts)
        if is_too_many(n_lines) or not any(part.n_rows for part in (found, *parts)):
            found = Findings().collect(Rows(path, layout))  # which is told of the file as a whole
        else:
            for part in parts:
                found.append(part)
        return _report(found, layout) | {"sha256": digest.result()}


def _report(found: Findings, layout: Layout) -> dict[str, Any]:
    return found.summarize(max_invalid_fraction=layout.max_invalid_fraction)


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
    n_processes = min(len(os.sched_getaffinity(0)), options.file.stat().st_size // _PART_BYTES)
    gc.set_threshold(10_000)  # of a block of rows there are fewer objects, and in no circles
    if layout.container == "parquet":
        report = check_apart(options.file, layout)
    else:
        report = check_file(options.file, layout, n_processes=n_processes)
    write_json(options.report, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
