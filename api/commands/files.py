"""`residency files`: upload training data and list what is there."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from api.client import Client, ClientError, connect, locate, poll
from api.commands.output import AsJson, errors, format_bytes, format_time, out, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Upload and list files.")
_LINE_SHOWN_MAX = 300
_CHUNK_BYTES = 1 << 20
RowFormat = Annotated[str | None, typer.Option(help="The format of every row; otherwise its keys tell.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=COLUMN", help="The file's own column for a key; may be given several times."),
]
MaxInvalid = Annotated[
    float | None,
    typer.Option("--max-invalid-fraction", help="Part of the rows that may be wrong: they are left out."),
]


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)],
    *,
    purpose: str = "fine-tune",
    format: RowFormat = None,
    column: Columns = None,
    max_invalid: MaxInvalid = None,
    as_json: AsJson = False,
) -> None:
    """Upload a file and wait until its rows are checked."""
    client = connect()
    wishes = {
        "format": format,
        "column_map": json.dumps(read_columns(column)) if column else None,
        "max_invalid_fraction": None if max_invalid is None else f"{max_invalid:.9f}",
    }
    uploaded = send_file(client, path, purpose=purpose, **wishes)
    with errors.status(f"Checking {path.name}"):
        file = poll(
            lambda: client.get(locate("files", uploaded["id"])),
            until=lambda file: file["status"] in ("processed", "error"),
        )
    if file["status"] == "error":
        raise ClientError(_describe_error(path, file))
    if as_json:
        print_json(file)
    else:
        rows = f"  {file['rows']} rows" if file.get("rows") is not None else ""
        out.print(f"{file['id']}  {path.name}  {format_bytes(file['bytes'])}{rows}")


@app.command("list")
def list_files(*, purpose: str | None = None, as_json: AsJson = False) -> None:
    """List the files, newest first."""
    files = connect().list_all("/v1/files", purpose=purpose)
    if as_json:
        print_json(files)
        return
    print_table(
        ("ID", "NAME", "SIZE", "PURPOSE", "STATUS", "CREATED"),
        (
            (
                file["id"],
                file["filename"],
                format_bytes(file["bytes"]),
                file["purpose"],
                file["status"],
                format_time(file["created_at"]),
            )
            for file in files
        ),
        empty="No files. Upload one with `residency files upload PATH`.",
    )


def read_columns(given: list[str] | None) -> dict[str, str]:
    """`KEY=COLUMN` as a column map."""
    pairs = [text.partition("=") for text in given or []]
    for key, sign, column in pairs:
        if not (key and sign and column):
            raise ClientError(f"'{key}{sign}{column}' is not KEY=COLUMN.")
    return {key: column for key, _, column in pairs}


def send_file(
    client: Client, path: Path, *, purpose: str = "fine-tune", **wishes: str | None
) -> dict[str, Any]:
    """Upload a file, showing how far it is; the file object. The server stores only what has its digest."""
    with path.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, console=errors, transient=True) as progress,
        progress.open(path, "rb", description=f"Uploading {path.name}") as content,
    ):
        return client.put_bytes(
            "/v1/files",
            iter(partial(content.read, _CHUNK_BYTES), b""),
            size_bytes=path.stat().st_size,
            filename=path.name,
            purpose=purpose,
            sha256=sha256,
            **{name: wish for name, wish in wishes.items() if wish is not None},
        )


def _describe_error(path: Path, file: dict[str, Any]) -> str:
    """The server's complaint, and below it the line that it is about."""
    details = file.get("status_details") or "The file cannot be used."
    named = re.match(r"line (\d+)", details, re.IGNORECASE)
    line = _read_line(path, int(named[1])) if named else None
    return f"{path}: {details}" + (f"\n  {line}" if line else "")


def _read_line(path: Path, number: int) -> str | None:
    if not path.name.lower().endswith((".jsonl", ".json", ".csv", ".tsv", ".txt")):
        return None  # not a text as it lies there
    with path.open("rb") as file:
        for index, line in enumerate(file, start=1):
            if index == number:
                text = line.decode(errors="replace").strip()
                return text if len(text) <= _LINE_SHOWN_MAX else text[:_LINE_SHOWN_MAX] + "…"
    return None
