"""`residency nodes`: the machines that workers run on, what they offer and who holds it."""

from typing import Annotated, Any

import typer

from api.client import connect, locate
from api.commands.output import AsJson, format_bytes, format_time, out, print_json, print_table

app = typer.Typer(help="See the machines that workers run on; drain them before they are touched.")
Name = Annotated[str, typer.Argument(metavar="NODE")]


@app.callback(invoke_without_command=True)
def list_nodes(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List the nodes with their devices."""
    if context.invoked_subcommand is not None:
        return
    nodes = connect().get("/v1/nodes")["data"]
    if as_json:
        print_json(nodes)
        return
    print_table(
        ("NODE", "STATE", "SEEN", "DISK FREE", "DEVICE", "KIND", "MEMORY", "DEVICE STATE", "HELD BY"),
        (_row(node, device) for node in nodes for device in node["devices"]),
        empty="No worker has reported yet.",
    )


@app.command()
def drain(name: Name) -> None:
    """Let a node take no more work; what runs there saves a checkpoint and waits for another node."""
    _change(name, "drain")


@app.command()
def undrain(name: Name) -> None:
    """Let a node take work again."""
    _change(name, "undrain")


@app.command()
def release(name: Name, device: Annotated[str, typer.Argument(metavar="DEVICE")]) -> None:
    """Vouch for a quarantined device, such as cuda:0: jobs may use it again."""
    connect().post(f"{locate('nodes', name, 'devices', device)}/release")
    out.print(f"{name}  {device}  released")


def _change(name: str, verb: str) -> None:
    node = connect().post(f"{locate('nodes', name)}/{verb}")
    out.print(f"{node['name']}  {node['state']}")


def _row(node: dict[str, Any], device: dict[str, Any]) -> tuple[Any, ...]:
    return (
        node["name"],
        node["state"],
        format_time(node["last_seen_at"]),
        format_bytes(node["free_bytes"]),
        device["id"],
        device["kind"],
        format_bytes(device["memory_bytes"]),
        device["state"],
        device["held_by"] or "",
    )
