"""The supervised method, in this process, on the tiny model."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.folders.checkpoints import MANIFEST, list_checkpoints
from trainers.folders.exits import NanLoss
from trainers.run import run
from trainers.training.loop import Guarded
from trainers.training.ranks import StopRequest


class StopAt(StopRequest):
    """Asked to stop once the run has written the checkpoint or the loss of a step."""

    def __init__(self, run_dir: Path, *, step: int):
        self._events = run_dir / "events.jsonl"
        self._step = step

    @property
    def requested(self) -> bool:
        return self._events.exists() and f'"step": {self._step},' in self._events.read_text()


def train(run_dir: Path, *, stop: StopRequest | None = None) -> dict:
    assert run(run_dir, stop=stop or StopRequest()) == 0
    return json.loads((run_dir / "exit.json").read_text())


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_from_spec_to_output(make_run, events_of, curve_of, tiny_model: Path) -> None:
    run_dir = make_run(learning_rate=5e-3, n_epochs=5)
    end = train(run_dir)
    total = 5 * 6  # 22 rows in batches of 4
    assert (end["reason"], end["step"], end["resumed_from"]) == ("done", total, None)
    metrics = end["metrics"]
    assert metrics["train_loss"] < metrics["first_train_loss"]
    assert metrics["valid_loss"] < metrics["valid_loss_before"]
    assert list(curve_of(run_dir)) == list(range(1, total + 1))
    phases = [event["phase"] for event in events_of(run_dir, "phase")]
    assert phases[:4] == ["preparing", "loading", "training", "evaluating"]
    names = {path.name for path in (run_dir / "output").iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "trainer_state.json",
        "train_results.json",
        "eval_results.json",
    }
    (curves,) = (run_dir / "tensorboard").iterdir()
    assert b"train/loss" in curves.read_bytes()
    assert str(run_dir).encode() not in curves.read_bytes()
    kept = list_checkpoints(run_dir / "checkpoints")
    assert [step for step, _ in kept] == [24, 28, 30]
    told = events_of(run_dir, "checkpoint")[-3:]
    sums = [hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest() for _, path in kept]
    assert [(event["step"], event["manifest_sha256"]) for event in told] == list(
        zip([24, 28, 30], sums, strict=True)
    )
    assert all(event["metrics"].keys() >= {"train_loss", "valid_loss", "full_valid_loss"} for event in told)
    assert str(tiny_model) not in (run_dir / "output" / "adapter_config.json").read_text()
    assert not list(run_dir.rglob("*.bin"))


def test_validation_loss_is_the_mean_over_tokens_of_the_saved_adapter(make_run, tiny_model: Path) -> None:
    run_dir = make_run(n_valid=7, learning_rate=5e-3)  # 7 rows: the last batch is not full
    end = train(run_dir)
    folder = json.loads((run_dir / "prepared.json").read_text())["validation"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run_dir / "output")
    loss = hits = n_tokens = 0.0
    for row in Dataset.from_file(f"{folder}/rows.arrow"):
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        trained = labels != -100
        loss += torch.nn.functional.cross_entropy(logits[trained], labels[trained], reduction="sum").item()
        hits += (logits[trained].argmax(-1) == labels[trained]).sum().item()
        n_tokens += int(trained.sum())
    assert end["metrics"]["valid_loss"] == pytest.approx(loss / n_tokens, rel=1e-5)
    assert end["metrics"]["valid_mean_token_accuracy"] == pytest.approx(hits / n_tokens, abs=1e-6)


def test_the_same_seed_gives_the_same_run(make_run, curve_of) -> None:
    one, other = make_run("1"), make_run("2")
    train(one), train(other)
    assert curve_of(one) == curve_of(other)
    assert equal(adapter_of(one / "output"), adapter_of(other / "output"))


def test_evaluating_does_not_change_the_training(make_run, curve_of) -> None:
    with_validation = make_run("1", lora_dropout=0.1)
    without = make_run("2", lora_dropout=0.1, n_valid=0)
    train(with_validation), train(without)
    assert curve_of(with_validation) == curve_of(without)


# In mid-epoch, where an evaluation falls due, at the end of an epoch, and during an evaluation.
@pytest.mark.faults(g=4, everyday=True)
@pytest.mark.parametrize(("stop_at", "ends_at"), [(1, 2), (3, 4), (5, 6), (8, 8)])
def test_a_resumed_run_equals_the_uninterrupted_one(make_run, curve_of, stop_at: int, ends_at: int) -> None:
    settings = {"lora_dropout": 0.1, "n_epochs": 3}  # dropout: the random state must be resumed, too
    straight = make_run("1", **settings)
    whole = train(straight)
    first = make_run("2", **settings)
    stopped = train(first, stop=StopAt(first, step=stop_at))
    assert (stopped["reason"], stopped["step"]) == ("stopped", ends_at)
    assert not (first / "output").exists()
    second = make_run("3", resume_roots=(first / "checkpoints",), **settings)
    end = train(second)
    assert (end["reason"], end["resumed_from"]) == ("done", ends_at)
    assert curve_of(first) | curve_of(second) == curve_of(straight)
    assert not curve_of(first).keys() & curve_of(second).keys()
    assert equal(adapter_of(second / "output"), adapter_of(straight / "output"))
    for name in ("first_train_loss", "valid_loss_before", "valid_loss"):
        assert end["metrics"][name] == whole["metrics"][name]
    assert end["trained_tokens"] == whole["trained_tokens"]


def test_a_run_killed_after_its_last_checkpoint_takes_no_step_more(make_run, curve_of) -> None:
    straight = make_run("1", max_steps=7)  # amid the second epoch
    train(straight)
    second = make_run("2", max_steps=7, resume_roots=(straight / "checkpoints",))
    end = train(second)
    assert (end["reason"], end["step"], end["resumed_from"]) == ("done", 7, 7)
    assert curve_of(second) == {}
    assert equal(adapter_of(second / "output"), adapter_of(straight / "output"))


def test_a_damaged_checkpoint_is_passed_over_and_reported(make_run, events_of) -> None:
    first = make_run("1")
    train(first, stop=StopAt(first, step=9))
    newest = list_checkpoints(first / "checkpoints")[-1][1]
    (newest / "optimizer.pt").write_bytes(b"not what was written")
    second = make_run("2", resume_roots=(first / "checkpoints",))
    assert train(second)["resumed_from"] == 8
    warned = [
        e["data"] for e in events_of(second, "message") if e["data"].get("code") == "checkpoint.corrupt"
    ]
    assert [data["path"] for data in warned] == [str(newest)]
    assert "optimizer.pt" in warned[0]["problem"]


def test_a_checkpoint_of_other_settings_is_refused(make_run) -> None:
    first = make_run("1")
    train(first, stop=StopAt(first, step=4))
    second = make_run("2", resume_roots=(first / "checkpoints",), lora_rank=4)
    with pytest.raises(Exception, match="other hyperparameters"):
        run(second, stop=StopRequest())
    assert json.loads((second / "exit.json").read_text())["reason"] == "bad_checkpoint"


def test_a_stop_during_evaluation_keeps_the_step(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(n_valid=6)
    stop = StopRequest()
    evaluate = Guarded.evaluate

    def evaluate_while_stopping(trainer, *args, **kwargs):
        stop.requested = trainer.state.global_step == 4
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(Guarded, "evaluate", evaluate_while_stopping)
    end = train(run_dir, stop=stop)
    assert (end["reason"], end["step"]) == ("stopped", 4)
    assert [step for step, _ in list_checkpoints(run_dir / "checkpoints")] == [4]


def test_accumulation_does_not_change_the_loss(make_run, curve_of) -> None:
    one, other = make_run("1", micro_batch_size=4), make_run("2", micro_batch_size=1)
    train(one), train(other)
    for step, loss in curve_of(one).items():
        assert curve_of(other)[step] == pytest.approx(loss, rel=1e-4)


def test_a_loss_that_is_not_a_number_ends_the_run_before_the_weights_do(
    make_run, tmp_path, tiny_model
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(broken)
    run_dir = make_run(model_dir=broken, n_valid=0)
    with pytest.raises(NanLoss):
        run(run_dir, stop=StopRequest())
    end = json.loads((run_dir / "exit.json").read_text())
    assert (end["reason"], end["step"]) == ("nan_loss", 0)
    assert list_checkpoints(run_dir / "checkpoints") == []


def test_a_target_module_the_model_lacks_is_the_users_fault(make_run) -> None:
    run_dir = make_run(target_modules=["q_proj", "query"])
    assert run(run_dir, stop=StopRequest()) == 3
    end = json.loads((run_dir / "exit.json").read_text())
    assert end["reason"] == "bad_data"
    assert "'query'" in end["message"]
    assert "q_proj" in end["message"]


def test_bfloat16_trains_float32_adapters(make_run) -> None:
    run_dir = make_run(dtype="bfloat16", gradient_checkpointing=True, max_steps=4)
    assert train(run_dir)["reason"] == "done"
    assert {tensor.dtype for tensor in adapter_of(run_dir / "output").values()} == {torch.float32}


def test_the_output_is_a_working_adapter_with_its_tokenizer(make_run, tiny_model: Path) -> None:
    run_dir = make_run(learning_rate=5e-3)
    train(run_dir)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "output")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, run_dir / "output")(ids).logits
    assert not torch.equal(before, after)
