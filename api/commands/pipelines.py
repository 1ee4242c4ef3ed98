"""`residency run` and `residency pipelines`: several trainings as one submission."""

import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from api import client as http
from api.client import Client, ClientError, connect, locate
from api.commands.files import send_file
from api.commands.follow import TERMINAL, detachable, insist
from api.commands.output import AsJson, errors, format_time, out, plain, print_fields, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="List, show and cancel pipelines; `residency run` starts one.")
PipelineId = Annotated[str, typer.Argument(metavar="ID")]


def run(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="The pipeline as YAML. Files stand there by id, or by path, and then are uploaded.",
        ),
    ],
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it until it is over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a pipeline. Stages that ran before with the same inputs are not run again."""
    client = connect()
    pipeline = client.post("/v1/pipelines", **_upload_files(client, _read(path), folder=path.parent))
    if as_json:
        print_json(pipeline)
    else:
        out.print(pipeline["id"])
    if follow:
        raise typer.Exit(_follow(client, pipeline["id"]))


@app.command("list")
def list_pipelines(*, as_json: AsJson = False) -> None:
    """List the pipelines, newest first."""
    found = connect().list_all("/v1/pipelines", limit=100)
    if as_json:
        print_json(found)
        return
    print_table(
        ("ID", "NAME", "STATUS", "STAGES", "CREATED"),
        (
            (
                pipeline["id"],
                pipeline["name"],
                pipeline["status"],
                f"{_count_succeeded(pipeline)}/{len(pipeline['stages'])}",
                format_time(pipeline["created_at"]),
            )
            for pipeline in found
        ),
        empty="No pipelines. Start one with `residency run FILE`.",
    )


@app.command()
def show(pipeline_id: PipelineId, *, as_json: AsJson = False) -> None:
    """Show a pipeline and its stages."""
    pipeline = connect().get(locate("pipelines", pipeline_id))
    if as_json:
        print_json(pipeline)
        return
    print_fields(
        {
            "id": pipeline["id"],
            "name": pipeline["name"],
            "status": pipeline["status"],
            "created": format_time(pipeline["created_at"]),
            "finished": format_time(pipeline["finished_at"]),
        }
    )
    out.print()
    print_table(
        ("STAGE", "STATUS", "JOB", "MODEL", "RESULT", "NOTE"),
        (
            (
                stage["name"],
                stage["status"],
                stage["job_id"],
                stage["model"],
                stage["fine_tuned_model"],
                "reused" if stage["reused"] else (stage["error"] or {}).get("message"),
            )
            for stage in pipeline["stages"]
        ),
        empty="It has no stages.",
    )


@app.command()
def cancel(pipeline_id: PipelineId) -> None:
    """Ask for the end of every stage that is not over."""
    pipeline = connect().post(locate("pipelines", pipeline_id, "cancel"))
    ending = "" if pipeline["status"] in TERMINAL else " (it ends as soon as its workers have heard)"
    out.print(f"{pipeline['id']}  {pipeline['status']}{ending}")


def _read(path: Path) -> dict[str, Any]:
    import yaml  # nothing else here needs it

    try:
        pipeline = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClientError(f"{path} cannot be read: {error}") from None
    if not isinstance(pipeline, dict) or not all(isinstance(key, str) for key in pipeline):
        raise ClientError(f"{path} is not a pipeline: it must have a name and stages.")
    return pipeline


def _upload_files(client: Client, pipeline: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    """The pipeline with the ids of the files that it names by their paths; each is uploaded once."""
    uploaded: dict[Path, str] = {}

    def upload(named: Any) -> Any:
        path = folder / str(named)
        if not path.is_file():
            return named
        if path not in uploaded:
            uploaded[path] = send_file(client, path)["id"]
        return uploaded[path]

    def replace(stage: Any) -> Any:
        if not isinstance(stage, dict):
            return stage
        single = {key: upload(stage[key]) for key in ("training_file", "validation_file") if key in stage}
        mixed = stage.get("training_files")
        if isinstance(mixed, list):
            single["training_files"] = [
                part | {"file": upload(part["file"])} if isinstance(part, dict) and "file" in part else part
                for part in mixed
            ]
        return stage | single

    stages = pipeline.get("stages")
    if not isinstance(stages, list):
        return pipeline  # the server says what is wrong with it
    return pipeline | {"stages": [replace(stage) for stage in stages]}


def _follow(client: Client, pipeline_id: str) -> int:
    """Print every stage as its status changes until all are over. The exit status: 0 if they succeeded."""
    told: dict[str, str] = {}
    path = locate("pipelines", pipeline_id)
    with detachable("pipeline", hint=f"residency pipelines show {pipeline_id}"):
        while True:
            pipeline = insist(client.get, path)
            for stage in pipeline["stages"]:
                if told.get(stage["name"]) != stage["status"]:
                    told[stage["name"]] = stage["status"]
                    _print_stage(stage)
            if pipeline["status"] in TERMINAL:
                break
            time.sleep(http.POLL_EVERY_S)
    if pipeline["status"] == "succeeded":
        return 0
    errors.print(plain(f"{pipeline_id} {pipeline['status']}"), style="red")
    return 1


def _print_stage(stage: dict[str, Any]) -> None:
    reused = " (reused)" if stage["reused"] else ""
    result = stage["fine_tuned_model"] or (stage["error"] or {}).get("message")
    when = datetime.now().strftime("%H:%M:%S")
    line = f"{when}  {stage['name']} {stage['status']}{reused}" + (f": {result}" if result else "")
    out.print(plain(line), soft_wrap=True)


def _count_succeeded(pipeline: dict[str, Any]) -> int:
    return sum(stage["status"] == "succeeded" for stage in pipeline["stages"])
