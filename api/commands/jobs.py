"""`residency jobs`: submit fine-tuning jobs, watch, pause and cancel them."""

import json
from typing import Annotated, Any

import typer

from api.client import Client, connect, locate
from api.commands.artifacts import artifacts, download
from api.commands.follow import follow_job, follow_log, print_event, read_events, read_log
from api.commands.output import (
    AsJson,
    format_duration,
    format_time,
    out,
    print_fields,
    print_json,
    print_table,
)

app = typer.Typer(no_args_is_help=True, help="Submit fine-tuning jobs, watch, pause and cancel them.")
app.command()(artifacts)
app.command()(download)
JobId = Annotated[str, typer.Argument(metavar="ID")]


@app.command()
def create(
    *,
    model: Annotated[str, typer.Option(help="Model to start from.")],
    file: Annotated[
        list[str],
        typer.Option(
            help="Id of the training file. Given more than once, the files are mixed: with weights, "
            "or each row once.",
            metavar="FILE_ID[=WEIGHT]",
        ),
    ],
    validation_file: Annotated[
        str | None, typer.Option(help="Id of a file to measure the loss on.", metavar="FILE_ID")
    ] = None,
    method: Annotated[str, typer.Option(help="How to train; `residency methods` lists them.")] = "supervised",
    suffix: Annotated[str | None, typer.Option(help="Goes into the name of the result.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training file.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples an optimizer step sees.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("-p", "--param", help="Any other hyperparameter.", metavar="NAME=VALUE"),
    ] = None,
    priority: Annotated[
        int | None, typer.Option(help="From -10 to 10; your jobs with a higher one are started first.")
    ] = None,
    on_oom: Annotated[
        str | None,
        typer.Option(
            help="`halve_batch`: with too little memory, go on with smaller passes.", metavar="WHAT"
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch the job until it is over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a fine-tuning job."""
    named = {"n_epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    hyperparameters = {name: value for name, value in named.items() if value is not None}
    for text in param or []:
        name, value = _parse_param(text)
        if name in hyperparameters:
            raise typer.BadParameter(f"{name} is given twice.")
        hyperparameters[name] = value
    client = connect()
    job = client.post(
        "/v1/fine_tuning/jobs",
        model=model,
        **_read_training_files(file),
        validation_file=validation_file,
        suffix=suffix,
        priority=priority,
        on_oom=on_oom,
        method={"type": method, method: {"hyperparameters": hyperparameters}},
    )
    _tell_made(client, job, follow=follow, as_json=as_json)


def _tell_made(client: Client, job: dict[str, Any], *, follow: bool, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        out.print(job["id"])
    if follow:
        raise typer.Exit(follow_job(client, job["id"]))


def _read_training_files(given: list[str]) -> dict[str, Any]:
    """The training files of a job, as the API takes them."""
    if len(given) == 1 and "=" not in given[0]:
        return {"training_file": given[0]}
    parts = []
    for text in given:
        file_id, equals, weight = text.partition("=")
        try:
            parts.append({"file": file_id} | ({"weight": float(weight)} if equals else {}))
        except ValueError:
            raise typer.BadParameter(f"{weight!r} is not a weight.") from None
    return {"training_files": parts}


@app.command()
def retry(
    job_id: JobId,
    *,
    param: Annotated[
        list[str] | None,
        typer.Option("-p", "--param", help="A hyperparameter to be changed.", metavar="NAME=VALUE"),
    ] = None,
    as_suggested: Annotated[
        bool, typer.Option("--as-suggested", help="With the changes that the diagnosis suggests.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch the job until it is over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try a failed or cancelled job again, as a new one; unchanged, it goes on from the last checkpoint."""
    client = connect()
    changes = dict(_parse_param(text) for text in param or [])
    if as_suggested:
        diagnosis = client.get(locate("fine_tuning", "jobs", job_id)).get("diagnosis") or {}
        suggested = (diagnosis.get("suggestion") or {}).get("changes") or {}
        if not suggested:
            raise typer.BadParameter("There is no suggestion for this job.", param_hint="--as-suggested")
        others = [f"{path}={value}" for path, value in suggested.items() if ".hyperparameters." not in path]
        if others:
            message = f"The suggestion is {', '.join(others)}, which a retry cannot change: submit a new job."
            raise typer.BadParameter(message, param_hint="--as-suggested")
        changes = {path.rpartition(".")[2]: value for path, value in suggested.items()} | changes
    job = client.post(locate("fine_tuning", "jobs", job_id, "retry"), hyperparameters=changes or None)
    _tell_made(client, job, follow=follow, as_json=as_json)


@app.command("list")
def list_jobs(*, as_json: AsJson = False) -> None:
    """List the jobs, newest first."""
    jobs = connect().list_all("/v1/fine_tuning/jobs", limit=100)
    if as_json:
        print_json(jobs)
        return
    print_table(
        ("ID", "MODEL", "STATUS", "STEP", "RESULT", "CREATED"),
        (
            (
                job["id"],
                job["model"],
                job["status"],
                _describe_step(job),
                job["fine_tuned_model"],
                format_time(job["created_at"]),
            )
            for job in jobs
        ),
        empty="No jobs. Submit one with `residency jobs create`.",
    )


@app.command()
def show(job_id: JobId, *, as_json: AsJson = False) -> None:
    """Show a job."""
    job = connect().get(locate("fine_tuning", "jobs", job_id))
    if as_json:
        print_json(job)
        return
    error, diagnosis = job["error"] or {}, job.get("diagnosis") or {}
    hyperparameters = job["hyperparameters"] or {}
    print_fields(
        {
            "id": job["id"],
            "status": job["status"],
            "phase": job.get("phase"),
            "step": _describe_step(job),
            "tries again": job.get("retry_of"),
            "queue position": job.get("queue_position"),
            "waits for": _describe_wait(job),
            "error": error.get("message"),
            "cause": diagnosis.get("code"),
            "advice": (diagnosis.get("suggestion") or {}).get("text"),
            "model": job["model"],
            "result": job["fine_tuned_model"],
            "training file": job["training_file"],
            "validation file": job["validation_file"],
            "trained tokens": job["trained_tokens"],
            "created": format_time(job["created_at"]),
            "finished": format_time(job["finished_at"]),
            "seed": job["seed"],
            "method": job["method"]["type"],
            **{f"  {name}": json.dumps(value) for name, value in hyperparameters.items()},
        }
    )


@app.command()
def logs(
    job_id: JobId,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The training process's own log.")] = False,
) -> None:
    """Print what happened to a job, oldest first. With -f, the exit status tells whether it succeeded."""
    client = connect()
    if follow:
        raise typer.Exit(follow_log(client, job_id) if raw else follow_job(client, job_id))
    if raw:
        for text in read_log(client, job_id):
            typer.echo(text, nl=False)
    else:
        for event in read_events(client, job_id):
            print_event(event)


@app.command()
def cancel(job_id: JobId) -> None:
    """Ask for the end of a job."""
    job = connect().post(locate("fine_tuning", "jobs", job_id, "cancel"))
    ending = "" if job["status"] == "cancelled" else " (it ends as soon as its worker has heard)"
    out.print(f"{job['id']}  {job['status']}{ending}")


@app.command()
def pause(job_id: JobId) -> None:
    """Ask for a pause: the job saves a checkpoint and gives its device back."""
    job = connect().post(locate("fine_tuning", "jobs", job_id, "pause"))
    ending = "" if job["status"] == "paused" else " (it pauses as soon as its worker has saved a checkpoint)"
    out.print(f"{job['id']}  {job['status']}{ending}")


@app.command()
def resume(job_id: JobId) -> None:
    """Queue a paused job again; it goes on from its last checkpoint."""
    job = connect().post(locate("fine_tuning", "jobs", job_id, "resume"))
    out.print(f"{job['id']}  {job['status']}")


def _parse_param(text: str) -> tuple[str, Any]:
    """`name=value`, where the value is JSON if it can be read as such, else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE.", param_hint="-p")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _describe_wait(job: dict[str, Any]) -> str | None:
    """Why a job has not started, in one line."""
    named = [
        " ".join(
            [reason["reason"], *(f"{name}={value}" for name, value in reason.items() if name != "reason")]
        )
        for reason in job.get("blocked_by") or []
    ]
    if job.get("expected_start_at") is not None:
        named.append(f"expected to start {format_time(job['expected_start_at'])}")
    return ", ".join(named) or None


def _describe_step(job: dict[str, Any]) -> str | None:
    progress = job.get("progress")
    if not progress:
        return None
    step = f"{progress['step']}/{progress['total_steps']}"
    if job["status"] != "running":
        return step
    return f"{step}, {format_duration(progress.get('eta_seconds'))} left"
