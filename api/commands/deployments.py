"""`residency deployments`: which models are loaded and answer."""

from typing import Annotated

import typer

from api.client import ClientError, connect, locate, poll
from api.commands.output import AsJson, errors, format_time, out, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Load models for chat and unload them.")


@app.command("list")
def list_deployments(
    *,
    everything: Annotated[bool, typer.Option("--all", help="Stopped ones too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the deployments, newest first."""
    found = connect().list_all("/v1/deployments", limit=100)
    deployments = [item for item in found if everything or item["status"] != "stopped"]
    if as_json:
        print_json(deployments)
        return
    print_table(
        ("ID", "MODEL", "STATUS", "CREATED"),
        (
            (item["id"], item["model"], item["status"], format_time(item["created_at"]))
            for item in deployments
        ),
        empty="No deployments. Make one with `residency deployments create MODEL`.",
    )


@app.command()
def create(
    model: Annotated[str, typer.Argument()],
    *,
    wait: Annotated[bool, typer.Option(help="Wait until the model answers.")] = True,
    as_json: AsJson = False,
) -> None:
    """Load a model so that it answers at once."""
    client = connect()
    deployment = client.post("/v1/deployments", model=model)
    if wait:
        with errors.status(f"Loading {model}"):
            deployment = poll(
                lambda: client.get(locate("deployments", deployment["id"])),
                until=lambda item: item["status"] in ("ready", "failed", "stopped"),
            )
        if deployment["status"] != "ready":
            reason = (deployment.get("error") or {}).get("message") or f"It is {deployment['status']}."
            raise ClientError(f"{model} could not be loaded: {reason}")
    if as_json:
        print_json(deployment)
    else:
        out.print(f"{deployment['id']}  {model}  {deployment['status']}")


@app.command()
def delete(deployment_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Unload a model."""
    connect().delete(locate("deployments", deployment_id))
    out.print(f"Stopped {deployment_id}")
