"""How the command line prints: results on stdout, all else on stderr, and nothing as markup."""

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the server's JSON.")]

_STATUS_STYLES = {
    "succeeded": "green",
    "ready": "green",
    "processed": "green",
    "running": "cyan",
    "importing": "cyan",
    "loading": "cyan",
    "failed": "red",
    "error": "red",
    "cancelled": "yellow",
}


def print_json(value: Any) -> None:
    """The object as the server sent it, one for machines to read."""
    typer.echo(json.dumps(value, indent=2))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]], *, empty: str) -> None:
    """A table without frames; cells that are None stay blank. `empty` is said when there is no row."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Ids and names are there to be copied: never cut them short.
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    if table.row_count:
        # Into a pipe, every row is one line.
        console = out if out.is_terminal else Console(width=10_000, highlight=False, markup=False)
        console.print(table)
    else:
        errors.print(empty)


def print_fields(fields: dict[str, Any]) -> None:
    """One object, a line a field; those that are None are left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if value is not None:
            table.add_row(name, _cell(value))
    out.print(table)


def plain(text: str) -> Text:
    """Text from elsewhere, without the control characters by which it could rewrite the screen."""
    return Text(strip_controls(text))


def strip_controls(text: str) -> str:
    """The text with newlines and tabs as its only control characters."""
    return "".join(char for char in text if char in "\n\t" or (char >= " " and not "\x7f" <= char <= "\x9f"))


def format_time(unix_s: float | None) -> str | None:
    """A local time for people."""
    return None if unix_s is None else datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M:%S")


def format_bytes(size: int | None) -> str | None:
    """A size in the largest unit that leaves at least 1."""
    if size is None:
        return None
    scaled, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while scaled >= 1000 and len(units) > 1:
        scaled, units = scaled / 1000, units[1:]
    return f"{scaled:.0f} {units[0]}" if units[0] == "B" else f"{scaled:.1f} {units[0]}"


def format_count(count: int | None) -> str | None:
    """A large number by its leading digits: 135M."""
    if count is None:
        return None
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(count)


def format_duration(seconds: float | None) -> str:
    """Minutes and seconds, hours where needed; `-:--` when unknown."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _cell(value: Any) -> Text:
    text = plain("" if value is None else str(value))
    text.stylize(_STATUS_STYLES.get(text.plain, ""))
    return text
