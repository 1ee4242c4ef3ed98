"""`residency data check`: what a training file holds and what is wrong with it, without a server."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from api.client import ClientError
from api.commands.files import Columns, RowFormat, read_columns
from api.commands.output import AsJson, out, plain, print_fields, print_json, print_table

_SHOWN_LINES = 10


def check(
    path: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True)],
    *,
    format: RowFormat = None,
    column: Columns = None,
    as_json: AsJson = False,
) -> None:
    """Check the rows of a file as the server would. Exit status 1: some are refused."""
    from trainers.specs import Layout, SpecError  # slow to import, and no other command needs it

    try:
        layout = Layout.of(path.name, format, read_columns(column))
    except SpecError as error:
        raise ClientError(f"{path}: {error.message}") from None
    report = _check(path, layout=json.dumps(dataclasses.asdict(layout)))
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report["accepted"]:
        raise typer.Exit(1)


def _check(path: Path, *, layout: str) -> dict[str, Any]:
    """The report that a worker would make: in a process of its own, since only trainers read rows."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "report.json"
        command = [sys.executable, "-m", "trainers.validate", str(path.absolute())]
        command += ["--layout", layout, "--report", str(target)]
        # A folder named `trainers` in the working directory would be imported instead of ours.
        env = os.environ | {"PYTHONSAFEPATH": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClientError(f"{path} could not be checked: {done.stderr[-500:]}")
        return json.loads(target.read_bytes())


def _show(report: dict[str, Any]) -> None:
    notices, sample = report["notices"], report["sample"]
    near = sample["near_duplicates"]
    print_fields(
        {
            "rows": f"{report['rows']}: {report['rows_used']} used, {report['rows_refused']} refused",
            "format": report["format"] and f"{report['format']} ({report['kind']} rows)",
            "duplicates": _name(report["duplicates"]["count"], report["duplicates"]["first"], "same_as"),
            "near duplicates": _name(near["count"], near["first"], "near"),
            "turns that say nothing": _list(notices["empty_turn"]),
            "roles out of order": _list(notices["role_order"]),
            "scripts": ", ".join(f"{name} {share:.1%}" for name, share in sample["scripts"].items()) or None,
            "sample": f"{sample['rows']} rows, for near duplicates and scripts" if sample["rows"] else None,
        }
    )
    if report["reasons"]:
        out.print()
        counts = report["reasons"].items()
        print_table(("REASON", "ROWS"), ((code, str(count)) for code, count in counts), empty="")
        out.print()
        listed = ((str(error["line"]), error["code"], plain(error["message"])) for error in report["errors"])
        print_table(("LINE", "REASON", "WHAT IS WRONG"), listed, empty="")
    if not report["whole"]:
        out.print("The file could not be read to its end.")


def _name(count: int, first: list[dict[str, Any]], key: str) -> str | None:
    pairs = [f"{pair['line']} as {pair[key]}" for pair in first[:_SHOWN_LINES]]
    return f"{count}: lines {', '.join(pairs)}{', …' if count > len(pairs) else ''}" if count else None


def _list(notice: dict[str, Any]) -> str | None:
    lines = [str(line) for line in notice["lines"][:_SHOWN_LINES]]
    more = ", …" if notice["count"] > len(lines) else ""
    return f"{notice['count']}: lines {', '.join(lines)}{more}" if notice["count"] else None
