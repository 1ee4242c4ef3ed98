"""`residency votes`: which of two answers was preferred, and a training file of that."""

from typing import Any

import typer

from api.client import ClientError, connect, locate, poll
from api.commands.output import AsJson, errors, format_bytes, format_time, out, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="See the votes between two answers, and learn from them.")
_SHOWN_MAX = 60


@app.command("list")
def list_votes(*, as_json: AsJson = False) -> None:
    """List the votes, newest first."""
    votes = connect().list_all("/v1/votes", limit=100)
    if as_json:
        print_json(votes)
        return
    print_table(
        ("ID", "CREATED", "PROMPT", "PREFERRED", "OVER"),
        (
            (
                vote["id"],
                format_time(vote["created_at"]),
                _shorten(vote["prompt"][-1]["content"]),
                vote["chosen"]["model"],
                vote["rejected"]["model"],
            )
            for vote in votes
        ),
        empty="No votes. Compare two models in the dashboard's playground, or POST /v1/votes.",
    )


@app.command()
def export(*, as_json: AsJson = False) -> None:
    """Make a training file of all votes, for `reward` and `dpo`, and wait until it is checked."""
    client = connect()
    made = client.post("/v1/votes/export")
    with errors.status("Checking the rows"):
        file = poll(
            lambda: client.get(locate("files", made["id"])),
            until=lambda file: file["status"] in ("processed", "error"),
        )
    if file["status"] == "error":
        raise ClientError(f"{file['id']}: {file['status_details']}")
    if as_json:
        print_json(file)
    else:
        out.print(f"{file['id']}  {file['filename']}  {format_bytes(file['bytes'])}  {file['rows']} rows")


def _shorten(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= _SHOWN_MAX else line[:_SHOWN_MAX] + "…"
