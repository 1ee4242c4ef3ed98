"""`residency data check`: what a training file holds and what is wrong with it, without a server."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from api.commands.files import Columns, MaxInvalid, RowFormat
from api.commands.output import AsJson, out, plain, print_fields, print_json, print_table
from api.commands.trainer import ask_trainer, describe_layout

_SHOWN_LINES = 10
_NOTICES = {
    "empty_turn": "turns that say nothing",
    "role_order": "roles out of order",
    "over_long": "over-long rows",
    "odd_last_turn": "unanswered among answered",
}


def check(
    path: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True)],
    *,
    format: RowFormat = None,
    column: Columns = None,
    max_invalid: MaxInvalid = None,
    as_json: AsJson = False,
) -> None:
    """Check the rows of a file as the server would. Exit status 1: the file is refused."""
    layout = describe_layout(path, format=format, column=column, max_invalid=max_invalid)
    report = ask_trainer("trainers.validate", str(path.absolute()), f"--layout={json.dumps(layout)}")
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report["accepted"]:
        raise typer.Exit(1)


def _show(report: dict[str, Any]) -> None:
    notices: dict[str, Any] = report["notices"]
    sample = report["sample"]
    near = sample["near_duplicates"]
    print_fields(
        {
            "rows": f"{report['rows']}: {report['rows_used']} used, {report['rows_refused']} refused",
            "format": report["format"] and f"{report['format']} ({report['kind']} rows)",
            "duplicates": _name(report["duplicates"]["count"], report["duplicates"]["first"], "same_as"),
            "near duplicates": _name(near["count"], near["first"], "near"),
            **{_NOTICES.get(code) or code: _list(found) for code, found in notices.items()},
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
