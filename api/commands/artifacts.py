"""`residency jobs artifacts` and `download`: the files that training left."""

from pathlib import Path
from typing import Annotated, Any

import typer

from api.client import Client, ClientError, connect, locate
from api.commands.output import AsJson, errors, format_bytes, format_time, out, print_json, print_table

JobId = Annotated[str, typer.Argument(metavar="ID")]


def artifacts(job_id: JobId, *, as_json: AsJson = False) -> None:
    """List the files of a job: adapter, tokenizer, checkpoints, metrics, logs."""
    found = connect().list_all(locate("fine_tuning", "jobs", job_id, "artifacts"))
    if as_json:
        print_json(found)
        return
    print_table(
        ("NAME", "KIND", "SIZE", "CREATED"),
        (
            (item["name"], item["kind"], format_bytes(item["bytes"]), format_time(item["created_at"]))
            for item in found
        ),
        empty="No files yet. They come once the job runs.",
    )


def download(
    job_id: JobId,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Files or folders; all when none is named."),
    ] = None,
    *,
    to: Annotated[Path, typer.Option(help="Folder that they are written to.", file_okay=False)],
) -> None:
    """Download files of a job. Those that are there already are replaced."""
    client = connect()
    path = locate("fine_tuning", "jobs", job_id, "artifacts")
    there = client.list_all(path)
    for name in names or []:
        if not any(_is_at(item, name) for item in there):
            raise ClientError(f"{job_id} has no file {name!r}; see `residency jobs artifacts {job_id}`.")
    for item in there:
        if not names or any(_is_at(item, name) for name in names):
            target = _target(to, item["name"])
            with errors.status(f"{item['name']}  {format_bytes(item['bytes'])}"):
                _save(client, locate("fine_tuning", "jobs", job_id, "artifacts", item["name"]), target)
            out.print(str(target), soft_wrap=True)


def _is_at(item: dict[str, Any], name: str) -> bool:
    """Whether the file is the one called `name`, or in the folder of that name."""
    return item["name"] == name or item["name"].startswith(name.rstrip("/") + "/")


def _target(folder: Path, name: str) -> Path:
    """Where the file goes. A server must not choose a place outside of `folder`."""
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()) or target.resolve() == folder.resolve():
        raise ClientError(f"The server names a file that would lie outside of {folder}: {name!r}")
    return target


def _save(client: Client, path: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download(path, target)
    except OSError as error:
        raise ClientError(f"{target} cannot be written: {error.strerror}") from None
