"""`residency data check`: what a training file holds and what is wrong with it, without a server."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from api.client import ClientError
from api.commands.files import Columns, MaxInvalid, RowFormat
from api.commands.output import AsJson, errors, out, plain, print_fields, print_json, print_table
from api.commands.trainer import ask_trainer, describe_layout, look_with_model

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
    model: Annotated[
        str | None, typer.Option(help="A model folder: count the tokens of the rows, too.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="How it would be trained. [supervised]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of the longest row.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the rows of a file as the server would. Exit status 1: the file is refused.

    With --model also, under `tokens`, what `GET /v1/files/ID/tokens` answers.
    """
    if model is None and (method, max_length) != (None, None):
        raise ClientError("--method and --max-length need a --model whose tokens are counted.")
    layout = describe_layout(path, format=format, column=column, max_invalid=max_invalid)
    report = ask_trainer("trainers.validate", str(path.absolute()), f"--layout={json.dumps(layout)}")
    if model is not None:
        given = {} if max_length is None else {"max_length": max_length}
        asked = {"layout": layout, "method": method or "supervised", "hyperparameters": given}
        with errors.status("Counting tokens"):
            report["tokens"] = look_with_model("trainers.token_stats", path, model=model, **asked)
    if as_json:
        print_json(report)
    else:
        _show(report)
        if model is not None:
            _show_tokens(report["tokens"])
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


def _show_tokens(tokens: dict[str, Any]) -> None:
    for note in tokens["notes"]:
        errors.print(plain(note), style="yellow")
    sampled = f", of a sample of {tokens['measured_rows']} rows" if tokens["sampled"] else ""
    shares = {
        "cut": (tokens["truncated"], tokens["truncated_share"]),
        "trained": (tokens["trainable_tokens"], tokens["trainable_share"]),
    }
    told = {name: f"{n} ({share:.1%})" for name, (n, share) in shares.items() if n and share is not None}
    lengths = ", ".join(f"{percent}%: {length}" for percent, length in tokens["percentiles"].items())
    out.print()
    print_fields(
        {
            "tokens": f"{tokens['tokens']} of {tokens['examples']} examples{sampled}",
            "cut": told.get("cut"),
            "trained tokens": told.get("trained"),
            "left out": tokens["dropped"] or None,
            "refused": tokens["refused"] or None,
            "up to so many tokens": lengths or None,
        }
    )
    out.print()
    filled = [bucket for bucket in tokens["histogram"] if bucket["count"]]
    rows = ((_limit(bucket["up_to"]), str(bucket["count"])) for bucket in filled)
    print_table(("TOKENS", "ROWS"), rows, empty="")


def _limit(up_to: int | None) -> str:
    return "more" if up_to is None else f"up to {up_to}"


def _name(count: int, first: list[dict[str, Any]], key: str) -> str | None:
    pairs = [f"{pair['line']} as {pair[key]}" for pair in first[:_SHOWN_LINES]]
    return f"{count}: lines {', '.join(pairs)}{', …' if count > len(pairs) else ''}" if count else None


def _list(notice: dict[str, Any]) -> str | None:
    lines = [str(line) for line in notice["lines"][:_SHOWN_LINES]]
    more = ", …" if notice["count"] > len(lines) else ""
    return f"{notice['count']}: lines {', '.join(lines)}{more}" if notice["count"] else None
