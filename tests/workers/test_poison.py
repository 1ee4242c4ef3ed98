"""Jobs that can never succeed stop, each after as many attempts as it deserves, and say why (G8)."""

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.stack import Stack, processes_of, start_stack, wait_for
from tests.workers.test_recovery import job_of, submit, wait_for_end

pytestmark = pytest.mark.faults(g=8, everyday=True)


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """A stack with the tiny model, and with one whose weights are no numbers."""
    folder = tmp_path_factory.mktemp("poison")
    broken = folder / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    stack = start_stack(folder / "home", import_dirs=[folder, tiny_model])
    stack.import_model(tiny_model, model_id="tiny")
    stack.import_model(broken, model_id="broken")
    yield stack
    stack.stop()
    assert processes_of(stack.home) == []


def create(stack: Stack, content: Path, *, model: str = "tiny", **hyperparameters: Any) -> str:
    client = stack.sdk()
    with content.open("rb") as source:
        file = client.files.create(file=source, purpose="fine-tune")
    method = {"type": "supervised", "supervised": {"hyperparameters": {"max_steps": 2} | hyperparameters}}
    return client.fine_tuning.jobs.create(model=model, training_file=file.id, method=method).id  # type: ignore[arg-type]


def diagnosis_of(stack: Stack, job_id: str, *, error: str) -> dict[str, Any]:
    ended = wait_for_end(stack, job_id)
    assert (ended["status"], ended["error"]["code"]) == ("failed", error), ended
    return job_of(stack, job_id)["diagnosis"]


@pytest.mark.long
def test_the_users_faults_cost_one_attempt(own_stack: Stack, chat_file: Path, tmp_path: Path) -> None:
    cut = create(own_stack, chat_file, max_length=16)  # no answer begins so early
    broken = create(own_stack, chat_file, model="broken", eval_prompts=[])
    rows = tmp_path / "rows.jsonl"
    rows.write_text(chat_file.read_text() + "no JSON\n")
    refused = create(own_stack, rows)

    row = diagnosis_of(own_stack, refused, error="invalid_training_file")
    assert (row["code"], row["line"], row["attempts"]) == ("bad_row", 65, 0)
    data = diagnosis_of(own_stack, cut, error="invalid_training_file")
    assert (data["code"], data["attempts"], data["retryable"]) == ("bad_data", 1, False)
    assert any("raise max_length" in line for line in data["log_tail"])
    nan = diagnosis_of(own_stack, broken, error="nan_loss")
    assert (nan["code"], nan["attempts"], nan["retryable"]) == ("nan_loss", 1, False)
    assert "method.supervised.hyperparameters.learning_rate" in nan["suggestion"]["changes"]
    assert 0 < len(nan["log_tail"]) <= 50


def ranks_of(stack: Stack, job_id: str, attempt: int) -> list[psutil.Process]:
    """The trainers of an attempt, without their torchrun."""
    run_dir = str(stack.home / "runs" / job_id / str(attempt))
    found = []
    for process in processes_of(stack.home):
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if run_dir in words and "torch.distributed.run" not in words:
                found.append(process)
    return found


@pytest.mark.long
def test_a_trainer_that_always_crashes_gets_three_attempts(own_stack: Stack, chat_file: Path) -> None:
    job_id = submit(own_stack, chat_file, save_steps=5_000)
    for attempt in (1, 2, 3):
        ranks = wait_for(
            partial(ranks_of, own_stack, job_id, attempt), within_s=400, what=f"attempt {attempt}"
        )
        for process in ranks:
            process.send_signal(signal.SIGSEGV)
    found = diagnosis_of(own_stack, job_id, error="too_many_attempts")
    assert (found["code"], found["attempts"], found["retryable"]) == ("trainer_killed", 3, True)
    assert found["message"] == "The trainer was killed by SIGSEGV; no attempt is left."
    assert any("SIGSEGV" in line for line in found["log_tail"])


@pytest.mark.long
def test_a_job_that_lacks_memory_goes_on_with_half_a_pass(own_stack: Stack, tmp_path: Path) -> None:
    """The kernel grants the first attempt next to nothing beyond what it has when its first step begins."""
    long = {"role": "assistant", "content": "Aspirin thins the blood. " * 400}
    rows = tmp_path / "long.jsonl"
    rows.write_text(f"{json.dumps({'messages': [{'role': 'user', 'content': 'Tell.'}, long]})}\n" * 32)
    settings = {"max_steps": 2, "batch_size": 32, "micro_batch_size": 32, "max_length": 2048}
    with own_stack.http() as http:
        file = http.post("/files", files={"file": rows.open("rb")}, data={"purpose": "fine-tune"}).json()
        method = {"type": "supervised", "supervised": {"hyperparameters": settings}}
        body = {"model": "tiny", "training_file": file["id"], "method": method, "on_oom": "halve_batch"}
        job_id = http.post("/fine_tuning/jobs", json=body).json()["id"]

        def messages() -> list[str]:
            page = http.get(f"/fine_tuning/jobs/{job_id}/events?limit=100").json()["data"]
            return [event["message"] for event in page]

        wait_for(lambda: any("trainable parameters" in m for m in messages()), within_s=150, what="the model")
        for process in ranks_of(own_stack, job_id, 1):
            allowed = process.memory_info().vms + (64 << 20)
            resource.prlimit(process.pid, resource.RLIMIT_AS, (allowed, allowed))
        job = wait_for_end(own_stack, job_id)
        assert job["status"] == "succeeded", (job["error"], messages())
        said = "Too little memory for passes of 32 rows: it goes on with 16, and a batch stays 32 rows"
        assert any(said in message for message in messages()), messages()
    assert (job["hyperparameters"]["micro_batch_size"], job["hyperparameters"]["batch_size"]) == (16, 32)
