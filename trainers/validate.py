"""Checks a training file: `python -m trainers.validate FILE --method supervised --report OUT.json`.

Errors in the data are findings, so they go into the report and the exit status is 0.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from trainers.artifacts import write_json
from trainers.rows import RowError, Rows
from trainers.specs import METHODS

MAX_ERRORS = 100


def check_file(path: Path, *, max_errors: int = MAX_ERRORS) -> dict[str, Any]:
    """Counts and errors of a file: rows, format, blank_lines, n_errors and the first of the errors."""
    rows = Rows(path)
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
        "blank_lines": rows.blank_lines,
        "errors": errors,
        "n_errors": n_errors,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers.validate")
    parser.add_argument("file", type=Path)
    parser.add_argument("--method", choices=METHODS, default="supervised")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args(arguments)
    write_json(options.report, check_file(options.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
