"""Jobs that can never succeed stop, each after as many attempts as it deserves, and say why (G8)."""

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


@pytest.fixture
def own_stack(tmp_path: Path, tiny_model: Path) -> Iterator[Stack]:
    """A stack with the tiny model, and with one whose weights are no numbers."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    stack = start_stack(tmp_path / "home", import_dirs=[tmp_path, tiny_model])
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
