"""`residency keys`: who may speak for the organisation."""

import time
from typing import Annotated, Any

import typer

from api.client import connect, locate
from api.commands.output import AsJson, errors, format_time, out, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke keys (admins).")
_DAY_S = 86_400


@app.command("list")
def list_keys(
    *,
    everything: Annotated[bool, typer.Option("--all", help="Revoked and expired ones too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the keys of your organisation, newest first."""
    found = connect().list_all("/v1/keys", limit=100)
    keys = [key for key in found if everything or _state(key) == "valid"]
    if as_json:
        print_json(keys)
        return
    print_table(
        ("ID", "NAME", "ROLE", "STATE", "CREATED", "LAST USED", "EXPIRES"),
        (
            (
                key["id"],
                key["name"],
                key["role"],
                _state(key),
                format_time(key["created_at"]),
                format_time(key["last_used_at"]),
                format_time(key["expires_at"]),
            )
            for key in keys
        ),
        empty="No keys. Make one with `residency keys create NAME`.",
    )


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what will use it.")],
    *,
    admin: Annotated[bool, typer.Option(help="It may also import models, and make and revoke keys.")] = False,
    days: Annotated[float | None, typer.Option(min=0, max=3650, help="It expires then.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it; it cannot be read again."""
    key = connect().post(
        "/v1/keys",
        name=name,
        role="admin" if admin else "user",
        expires_in_s=None if days is None else max(1, round(days * _DAY_S)),
    )
    if as_json:
        print_json(key)
        return
    errors.print(f"Key {key['id']} for {name}. Keep it: it is not shown again.")
    out.print(key["key"], soft_wrap=True)


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Let a key open nothing any more."""
    connect().delete(locate("keys", key_id))
    out.print(f"Revoked {key_id}")


def _state(key: dict[str, Any]) -> str:
    if key["revoked_at"] is not None:
        return "revoked"
    return "expired" if key["expires_at"] is not None and key["expires_at"] <= time.time() else "valid"
