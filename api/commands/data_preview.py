"""`residency data preview`: what a model will see in a file, on this machine or on the server."""

import json
import time
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from api.client import ClientError, Refused, connect, locate
from api.commands.files import Columns, RowFormat
from api.commands.output import AsJson, errors, out, plain, print_json, print_table, strip_controls
from api.commands.trainer import describe_layout, look_with_model

_TRAINED_STYLE = "bold green"
_OPEN, _CLOSE = "⟦", "⟧"  # around what is trained, for those who see no colours


def preview(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A file of this machine, or the id of an uploaded one.")
    ],
    *,
    model: Annotated[str, typer.Option(help="A model folder of this machine, or the id of a model.")],
    method: Annotated[str, typer.Option(help="How it would be trained.")] = "supervised",
    row: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of a row; may be given several times. Without it: the first three."),
    ] = None,
    format: RowFormat = None,
    column: Columns = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of the longest row.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of a block of plain text.")] = None,
    train_on_inputs: Annotated[bool, typer.Option("--train-on-inputs", help="Train on all tokens.")] = False,
    chat_template: Annotated[
        str | None, typer.Option("--template", help="A chat template by name, in place of the model's own.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="List every token.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show rows as training will see them: ⟦what is trained⟧ and what is only read.

    A file and a model folder of this machine need no server.
    """
    shaping = {
        "max_length": max_length,
        "block_size": block_size,
        "train_on_inputs": train_on_inputs or None,
        "chat_template": chat_template,
    }
    given = {name: value for name, value in shaping.items() if value is not None}
    if Path(source).is_file():
        layout = describe_layout(Path(source), format=format, column=column)
        request = {"layout": layout, "method": method, "rows": row, "hyperparameters": given}
        with errors.status("Looking"):
            found = look_with_model("trainers.preview", Path(source), model=model, **request)
    elif format or column:
        raise ClientError("How the rows of an uploaded file are to be read was said when it was uploaded.")
    else:
        found = _ask_server(source, model=model, method=method, row=row, **given)
    if as_json:
        print_json(found)
        return
    for note in found["notes"]:
        errors.print(plain(note), style="yellow")
    for shown in found["rows"]:
        _print_row(shown, list_tokens=tokens)


def _ask_server(file_id: str, **query: Any) -> dict[str, Any]:
    client = connect()
    with errors.status("Looking"):
        while True:
            try:
                return client.get(locate("files", file_id, "preview"), **query)
            except Refused as refusal:
                if refusal.code != "preview_pending":
                    raise
                time.sleep(refusal.retry_after_s or 1.0)


def _print_row(row: dict[str, Any], *, list_tokens: bool) -> None:
    counts = f"{row['tokens']} tokens, {row['trainable_tokens']} trained"
    if row["truncated"]:
        counts += f", cut from {row['full_tokens']}"
    head = f"Row {row['row']} (line {row['line']})"
    out.print(plain(f"{head}: {counts}" if row["texts"] else head), style="bold")
    if row["error"] is not None:
        out.print(plain(f"Left out: {row['error']}"), style="red", soft_wrap=True)
    for text in row["texts"]:
        if text["name"] != "text":
            out.print(f"-- {text['name']}")
        if list_tokens:
            _print_tokens(text["tokens"])
        else:
            out.print(_mark(text["tokens"]), soft_wrap=True)
        if text["tokens_left_out"]:
            out.print(f"… and {text['tokens_left_out']} more tokens")
    out.print()


def _mark(tokens: list[dict[str, Any]]) -> Text:
    marked = Text()
    for trained, group in groupby(tokens, key=lambda token: token["trained"]):
        text = strip_controls("".join(token["text"] for token in group))
        marked.append(f"{_OPEN}{text}{_CLOSE}" if trained else text, style=_TRAINED_STYLE if trained else "")
    return marked


def _print_tokens(tokens: list[dict[str, Any]]) -> None:
    print_table(
        ("ID", "TEXT", "BYTES", "TRAINED"),
        (
            (
                token["id"],
                json.dumps(token["text"], ensure_ascii=False),
                token.get("bytes"),
                "yes" if token["trained"] else None,
            )
            for token in tokens
        ),
        empty="No tokens.",
    )
