"""`residency models`: import base models, list and delete models."""

from pathlib import Path
from typing import Annotated, Any

import typer

from api.client import ClientError, connect, locate, poll
from api.commands.output import (
    AsJson,
    errors,
    format_bytes,
    format_count,
    format_time,
    out,
    print_fields,
    print_json,
    print_table,
)

app = typer.Typer(no_args_is_help=True, help="Import, list and delete models.")
_JOB = "ftjob-"


@app.command("import")
def import_model(
    source: Annotated[
        str,
        typer.Argument(
            help="A model folder or a GGUF file on the server's machine, or hf://organisation/name@revision.",
            metavar="SOURCE",
        ),
    ],
    *,
    model_id: Annotated[str, typer.Option("--id", help="What the model will be called.")],
    base: Annotated[
        str | None, typer.Option(help="SOURCE is a LoRA adapter: the model to merge it into.")
    ] = None,
    then: Annotated[
        list[str] | None,
        typer.Option(
            help="Another adapter, or a job's id, merged into the result; may be given several times."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Import a model, or merge an adapter, and wait until it can be used."""
    client = connect()
    source, *others = (_spell_out(given) for given in (source, *(then or ())))
    if others or source.startswith(_JOB):
        client.post("/v1/models/import", id=model_id, adapters=[source, *others], base=base)
    else:
        client.post("/v1/models/import", id=model_id, source=source, base=base)
    with errors.status(f"Importing {model_id} from {source.rpartition('/')[2]}"):
        model = poll(
            lambda: client.get(locate("models", model_id)),
            until=lambda model: model["status"] in ("ready", "failed"),
        )
    if model["status"] == "failed":
        raise ClientError((model.get("error") or {}).get("message") or "The import failed.")
    if as_json:
        print_json(model)
        return
    details = _details(model)
    print_fields(
        {
            "id": model["id"],
            "parameters": format_count(details.get("parameters")),
            "context length": details.get("context_length"),
            "size": format_bytes(details.get("bytes")),
            "digest": model.get("digest"),
        }
    )


@app.command("list")
def list_models(*, as_json: AsJson = False) -> None:
    """List the models that can be trained on or chatted with."""
    models = connect().get("/v1/models")["data"]
    if as_json:
        print_json(models)
        return
    print_table(
        ("ID", "STATUS", "PARAMETERS", "CONTEXT", "PARENT", "CREATED"),
        (
            (
                model["id"],
                model.get("status"),
                format_count(_details(model).get("parameters")),
                _details(model).get("context_length"),
                model.get("parent"),
                format_time(model["created"]),
            )
            for model in models
        ),
        empty="No models. Import one with `residency models import PATH --id ID`.",
    )


@app.command()
def delete(model_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Delete a fine-tuned model; the record of its job stays."""
    deleted = connect().delete(locate("models", model_id))
    out.print(f"Deleted {deleted['id']}")


def _details(model: dict[str, Any]) -> dict[str, Any]:
    return model.get("details") or {}


def _spell_out(source: str) -> str:
    """A path as it reads from anywhere; what is no path as it is."""
    return source if source.startswith(("hf://", _JOB)) else str(Path(source).expanduser().absolute())
