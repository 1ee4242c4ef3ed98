"""Checks a training file: `python -m trainers.validate FILE [--layout JSON] --report OUT.json`.

Errors in the data are findings, so they go into the report and the exit status is 0.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trainers.artifacts import write_json
from trainers.rows import RowError, Rows
from trainers.specs.layouts import Layout

MAX_ERRORS = 100


def check_file(path: Path, layout: Layout, *, max_errors: int = MAX_ERRORS) -> dict[str, Any]:
    """Counts and errors of a file: rows, format, kind, blank_lines, n_errors and the first of the errors."""
    rows = Rows(path, layout)
    errors = []
    n_errors = 0
    for row in rows:
        if isinstance(row, RowError):
            n_errors += 1
            if len(errors) < max_errors:
                errors.append({"line": row.line, "message": row.message})
    return {
        "rows": rows.n_rows,
        "format": rows.format,
        "kind": rows.kind,
        "blank_lines": rows.blank_lines,
        "errors": errors,
        "n_errors": n_errors,
    }


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
