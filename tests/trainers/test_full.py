"""Training all weights, and training modules whole beside an adapter."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.trainers.test_reward import pairs
from trainers.engine import load_generator
from trainers.folders.checkpoints import list_checkpoints
from trainers.merge import merge_run
from trainers.run import run
from trainers.specs import SpecError, parse_method, resolve
from trainers.training.ranks import StopRequest


def train(run_dir: Path) -> dict:
    assert run(run_dir, stop=StopRequest()) == 0
    return json.loads((run_dir / "exit.json").read_text())


def in_bfloat16(folder: Path, tiny_model: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_all_weights_learn_and_are_published_as_the_base_is_stored(
    make_run, tiny_model: Path, tmp_path: Path
) -> None:
    base = in_bfloat16(tmp_path / "base", tiny_model)
    run_dir = make_run(model_dir=base, use_peft=False, learning_rate=5e-3, n_epochs=4, dtype="bfloat16")
    metrics = train(run_dir)["metrics"]
    assert metrics["valid_loss"] < metrics["valid_loss_before"] - 1
    assert not list((run_dir / "output").glob("adapter*"))

    report = merge_run(run_dir, out_dir=tmp_path / "merged")
    assert (report["trained"], report["dtype"], report["warnings"]) == ("all weights", "bfloat16", [])
    merged, trained, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", run_dir / "output", base)
    )
    assert merged.keys() == trained.keys() == before.keys()
    for name, weights in merged.items():
        assert weights.dtype == torch.bfloat16
        assert trained[name].dtype == torch.float32
        assert torch.equal(weights, trained[name].to(torch.bfloat16))
        assert not torch.equal(weights, before[name])

    # A checkpoint is served from its own folder: there is no adapter to put on the base.
    *_, (_, last) = list_checkpoints(run_dir / "checkpoints")
    served = load_generator(base, adapter_dir=last, dtype="auto", kv_cache_gib=None)
    found = served._manager.model.state_dict()
    assert all(torch.equal(found[name], weights) for name, weights in trained.items())


def test_a_reward_model_and_a_preference_without_an_adapter(make_run, tmp_path: Path) -> None:
    rows = {
        "rows": pairs(32),
        "valid_rows": pairs(8),
        "use_peft": False,
        "learning_rate": 2e-3,
        "n_epochs": 3,
    }
    judge = make_run("1", method="reward", **rows)
    assert train(judge)["metrics"]["valid_accuracy"] > 0.9
    merge_run(judge, out_dir=tmp_path / "judge")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    head = load_file(judge / "output" / "model.safetensors")["score.weight"]
    assert torch.equal(model.score.weight, head)

    aligned = make_run("2", method="dpo", **rows)
    metrics = train(aligned)["metrics"]
    assert metrics["valid_margin"] > 0.1
    assert metrics["valid_margin_before"] == pytest.approx(0, abs=1e-6)  # the reference is the base
    merge_run(aligned, out_dir=tmp_path / "aligned")


def test_a_stopped_full_run_goes_on_exactly(make_run, curve_of) -> None:
    settings = {"use_peft": False, "learning_rate": 1e-3, "save_steps": 4, "max_steps": 8}
    whole, part = make_run("1", **settings), make_run("2", **settings)
    train(whole)

    class StopLater(StopRequest):
        """Asks once four steps were logged."""

        @property
        def requested(self) -> bool:
            return (part / "events.jsonl").exists() and len(curve_of(part)) >= 4

        @requested.setter
        def requested(self, value: bool) -> None:
            pass

    assert run(part, stop=StopLater()) == 0
    rest = make_run("3", resume_roots=(part / "checkpoints",), **settings)
    assert 0 < train(rest)["resumed_from"] < 8
    ends = [load_file(folder / "output" / "model.safetensors") for folder in (whole, rest)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_modules_trained_whole_come_with_the_adapter(make_run, tiny_model: Path, tmp_path: Path) -> None:
    run_dir = make_run(modules_to_save="embed_tokens,model.norm", learning_rate=5e-3, max_steps=6)
    train(run_dir)
    assert merge_run(run_dir, out_dir=tmp_path / "merged")["warnings"] == []
    merged, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", tiny_model))
    assert merged.keys() == before.keys()  # tied stays tied
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert not torch.equal(merged[name], before[name])
    assert torch.equal(
        merged["model.layers.0.input_layernorm.weight"], before["model.layers.0.input_layernorm.weight"]
    )
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), run_dir / "output"
    ).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_module_that_is_not_there(make_run) -> None:
    run_dir = make_run(modules_to_save=["embed_tokns"])
    assert run(run_dir, stop=StopRequest()) == 3
    assert "embed_tokns" in json.loads((run_dir / "exit.json").read_text())["message"]


def test_the_rate_of_all_weights_is_a_tenth() -> None:
    rates = [
        resolve(parse_method(None, {"use_peft": use}), n_examples=10, seed=1)["learning_rate"]
        for use in (True, False)
    ]
    assert rates[1] == pytest.approx(rates[0] / 10)


@pytest.mark.parametrize(
    ("method", "given", "blamed"),
    [
        ("ppo", {"use_peft": False, "reward_model": "judge"}, "use_peft"),
        ("supervised", {"use_peft": False, "lora_rank": 4}, "lora_rank"),
        ("supervised", {"use_peft": False, "modules_to_save": "lm_head"}, "modules_to_save"),
        ("ppo", {"modules_to_save": "lm_head", "reward_model": "judge"}, "modules_to_save"),
        ("supervised", {"new_tokens": 3}, "new_tokens"),
    ],
)
def test_what_cannot_be_combined(method: str, given: dict, blamed: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_method({"type": method, method: {"hyperparameters": given}}, None)
    assert caught.value.param == f"method.{method}.hyperparameters.{blamed}"
