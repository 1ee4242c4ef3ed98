"""Checks a training file: `python -m trainers.validate FILE [--layout JSON] --report OUT.json`.

Errors in the data are findings, so they go into the report and the exit status is 0.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainers.artifacts import write_json
from trainers.duplicates import Duplicates, digest_record
from trainers.messages import Message
from trainers.row_formats import AnyRow, Document, Prompt, Row
from trainers.row_sample import RowSample
from trainers.rows import RowError, Rows
from trainers.specs.layouts import Layout

N_FIRST = 100  # lines that are named of each kind of finding; all are counted
NOTICES = ("empty_turn", "role_order")


def check_file(path: Path, layout: Layout) -> dict[str, Any]:
    """What is in a file, and what is wrong with it, in memory that only the number of its rows adds to.

    {rows, rows_used, rows_refused, blank_lines, format, kind, whole, max_invalid_fraction, accepted,
    reasons: {code: count}, errors: [{line, code, message}], notices: {code: {count, lines}},
    duplicates: {count, first}, sample}. Every row is used or refused, unless the file is not `whole`: then
    reading ended early.
    """
    rows = Rows(path, layout)
    reasons: Counter[str] = Counter()
    errors: list[dict[str, Any]] = []
    notices: dict[str, list[int]] = {code: [] for code in NOTICES}
    n_noticed: defaultdict[str, int] = defaultdict(int)
    duplicates, sample = Duplicates(), RowSample()
    n_used, whole = 0, True
    for row in rows:
        if isinstance(row, RowError):
            whole = whole and not row.ends_file
            reasons[row.code] += 1
            if reasons[row.code] <= N_FIRST:
                errors.append({"line": row.line, "code": row.code, "message": row.message})
            continue
        n_used += 1
        digest = digest_record(rows.record)
        duplicates.add(digest, line=row.line)
        sample.add(row, digest=digest)
        for code in find_notices(row):
            n_noticed[code] += 1
            if n_noticed[code] <= N_FIRST:
                notices[code].append(row.line)
    n_refused = rows.n_rows - n_used
    return {
        "rows": rows.n_rows,
        "rows_used": n_used,
        "rows_refused": n_refused,
        "blank_lines": rows.blank_lines,
        "format": rows.format,
        "kind": rows.kind,
        "whole": whole,
        "max_invalid_fraction": layout.max_invalid_fraction,
        "accepted": whole and n_used > 0 and n_refused <= layout.max_invalid_fraction * rows.n_rows,
        "reasons": dict(reasons.most_common()),
        "errors": errors,
        "notices": {code: {"count": n_noticed[code], "lines": lines} for code, lines in notices.items()},
        "duplicates": duplicates.summarize(n_first=N_FIRST),
        "sample": sample.summarize(n_first=N_FIRST),
    }


def find_notices(row: AnyRow) -> list[str]:
    """What may be meant and is trained on as it is: turns that say nothing, and roles out of their order."""
    if isinstance(row, Document):
        return []
    messages = row.messages if isinstance(row, Row | Prompt) else row.prompt
    found = [any(_is_empty(message) for message in messages), not _in_order(messages)]
    return [code for code, is_so in zip(NOTICES, found, strict=True) if is_so]


def _is_empty(message: Message) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


def _in_order(messages: list[Message]) -> bool:
    """Whether users and assistants take turns, after the system at most."""
    roles = [message["role"] for message in messages]
    repeated = any(one == next_ and one in ("user", "assistant") for one, next_ in pairwise(roles))
    return not repeated and "system" not in roles[1:]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers.validate")
    parser.add_argument("file", type=Path)
    parser.add_argument("--layout", type=json.loads, help="a Layout as JSON; otherwise by the file's name")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args(arguments)
    layout = Layout(**options.layout) if options.layout is not None else Layout.of(options.file.name)
    write_json(options.report, check_file(options.file, layout))
    return 0


if __name__ == "__main__":
    sys.exit(main())
