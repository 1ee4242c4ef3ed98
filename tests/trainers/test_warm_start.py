"""Warm start: the weights of an earlier adapter, and nothing else of its run."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import chat_rows
from tests.trainers.importing.hostile import edit_json
from tests.trainers.test_reward import pairs
from trainers.folders.checkpoints import list_checkpoints
from trainers.run import run
from trainers.specs import SpecError, load_run_spec, parse_method
from trainers.training.ranks import StopRequest

ROWS: dict[str, tuple[list[dict], list[dict]]] = {
    "supervised": (chat_rows(16), chat_rows(24)[16:]),
    "pretraining": (
        [{"text": f"Sample {number} was taken from the left arm."} for number in range(40)],
        [{"text": f"Sample {number} was taken from the right arm."} for number in range(10)],
    ),
    "reward": (pairs(16), pairs(8, seed=1)),
    "dpo": (pairs(16), pairs(8, seed=1)),
}


def start_from(
    run_dir: Path, adapter: Path, *, digest: str = "a" * 64, manifest_sha256: str | None = None
) -> Path:
    """Let the run start from the adapter, as the service does."""
    spec = json.loads((run_dir / "spec.json").read_text())
    spec["hyperparameters"]["init_adapter"] = "earlier"
    edit_json(
        run_dir / "spec.json",
        hyperparameters=spec["hyperparameters"],
        init_adapter_dir=str(adapter),
        init_adapter_digest=digest,
        init_manifest_sha256=manifest_sha256,
    )
    return run_dir


def train(run_dir: Path) -> dict[str, Any]:
    run(run_dir, stop=StopRequest())
    return json.loads((run_dir / "exit.json").read_text())


@pytest.fixture
def make(make_run: Callable[..., Path]) -> Callable[..., Path]:
    def make(name: str, method: str = "supervised", **settings: Any) -> Path:
        rows, valid_rows = ROWS[method]
        usual = {"learning_rate": 2e-3, "max_steps": 4, "save_steps": 2, "lora_rank": 4}
        if method == "pretraining":
            usual["block_size"] = 32
        return make_run(name, method=method, rows=rows, valid_rows=valid_rows, **(usual | settings))

    return make


@pytest.mark.parametrize("method", ROWS)
def test_it_begins_where_the_adapter_ended_with_everything_else_new(
    make, events_of, curve_of, method: str
) -> None:
    first, second = make("1", method), make("2", method)
    before = train(first)
    after = train(start_from(second, first / "output"))

    assert (after["reason"], after["step"], after["resumed_from"]) == ("done", 4, None)
    metrics = after["metrics"]
    # The very weights, and the head of a reward model: another one would score otherwise.
    assert metrics["valid_loss_before"] == pytest.approx(before["metrics"]["valid_loss"], abs=1e-6)
    assert abs(metrics["valid_loss_before"] - before["metrics"]["valid_loss_before"]) > 1e-4
    assert metrics["valid_loss"] < metrics["valid_loss_before"] - 1e-4
    # A new optimizer and a new schedule.
    rates = [
        {event["step"]: event["data"].get("learning_rate") for event in events_of(run_dir, "metrics")}
        for run_dir in (first, second)
    ]
    assert rates[0] == rates[1]
    assert list(curve_of(second)) == [1, 2, 3, 4]
    optimizer = torch.load(second / "checkpoints" / "step-2" / "optimizer.pt", weights_only=True)
    assert {float(state["step"]) for state in optimizer["state"].values()} == {2.0}
    # Every tensor of the adapter moved on from where it began.
    trained, begun = (
        load_file(run_dir / "output" / "adapter_model.safetensors") for run_dir in (second, first)
    )
    assert all(not torch.equal(trained[name], begun[name]) for name in begun)
    codes = [event["data"].get("code") for event in events_of(second, "message")]
    assert codes.count("warm_start") == 1


def test_a_resumed_run_goes_on_from_its_checkpoint_and_not_from_the_adapter(make, events_of) -> None:
    first, second = make("1"), make("2")
    train(first)
    train(start_from(second, first / "output"))
    shutil.rmtree(second / "checkpoints" / "step-4")
    third = make("3", resume_roots=(second / "checkpoints",))
    again = train(start_from(third, first / "output"))

    assert again["resumed_from"] == 2
    assert "warm_start" not in [event["data"].get("code") for event in events_of(third, "message")]
    weights = [(run_dir / "output" / "adapter_model.safetensors").read_bytes() for run_dir in (second, third)]
    assert weights[0] == weights[1]


def flip(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip, "adapter_model.safetensors does not match its sha256"),
        (lambda folder: (folder / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    ],
)
def test_a_checkpoint_is_read_only_as_it_was_sealed(
    make, damage: Callable[[Path], object], problem: str
) -> None:
    first = make("1")
    train(first)
    [*_, (_, newest)] = list_checkpoints(first / "checkpoints")
    sum_ = hashlib.sha256((newest / "MANIFEST.json").read_bytes()).hexdigest()
    assert train(start_from(make("2"), newest, manifest_sha256=sum_))["reason"] == "done"

    damage(newest)
    end = train(start_from(make("3"), newest, manifest_sha256=sum_))
    assert end["reason"] == "bad_data"
    assert problem in end["message"]


def test_another_adapter_is_another_run(make) -> None:
    folder = Path("/adapters/one")
    specs = [
        load_run_spec(run_dir)
        for run_dir in (
            make("1"),
            start_from(make("2"), folder),
            start_from(make("3"), folder, digest="b" * 64),
        )
    ]
    assert len({spec.settings_sha256() for spec in specs}) == 3


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        ({"lora_rank": 8}, "has r 4, and the job has 8"),
        ({"lora_alpha": 32}, "has lora_alpha 16.0, and the job has 32.0"),
        ({"target_modules": ["q_proj"]}, "tensors differ"),
        ({"method": "reward"}, "has task_type CAUSAL_LM"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(make, trained_once: Path, change: dict, tells: str) -> None:
    result = train(start_from(make("2", **change), trained_once))
    assert result["reason"] == "bad_data"
    assert tells in result["message"]


@pytest.fixture
def trained_once(make) -> Path:
    run_dir = make("1", max_steps=1)
    train(run_dir)
    return run_dir / "output"


def test_a_broken_adapter_is_refused(make, trained_once: Path) -> None:
    (trained_once / "adapter_model.safetensors").write_bytes(b"not what was written")
    result = train(start_from(make("2"), trained_once))
    assert (result["reason"], "cannot be read" in result["message"]) == ("bad_data", True)


def ask(method: str = "supervised", **hyperparameters: Any) -> Any:
    return parse_method({"type": method, method: {"hyperparameters": hyperparameters}}, None)


@pytest.mark.parametrize(
    ("method", "more", "reason"),
    [
        ("ppo", {"reward_model": "judge"}, "value head"),
        ("pretraining", {"new_tokens": 8}, "merged model"),
        ("supervised", {"deepspeed": "zero3"}, "ZeRO-3"),
        ("supervised", {"use_peft": False}, "use_peft is false"),
    ],
)
def test_what_cannot_start_from_an_adapter(method: str, more: dict, reason: str) -> None:
    with pytest.raises(SpecError, match=reason) as refused:
        ask(method, peft_path="ftjob-1", **more)
    assert refused.value.param == f"method.{method}.hyperparameters.peft_path"


def test_what_the_adapter_decides_is_left_to_it_unless_it_is_asked_for() -> None:
    asked = ask(init_adapter="ftjob-1", lora_rank=8)
    written = asked.to_request()["supervised"]["hyperparameters"]
    assert written["lora_rank"] == 8
    assert written.keys().isdisjoint({"lora_alpha", "target_modules", "modules_to_save"})
    assert parse_method(asked.to_request(), None).to_request() == asked.to_request()
    assert "lora_alpha" in ask().to_request()["supervised"]["hyperparameters"]


def test_to_resume_is_something_else() -> None:
    with pytest.raises(SpecError, match="init_adapter"):
        ask(resume_from_checkpoint="checkpoint-4")
