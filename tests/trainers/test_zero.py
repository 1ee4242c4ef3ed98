"""DeepSpeed's ZeRO on two ranks: the losses of one process, whole adapters, checkpoints that are resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.specs.test_combinations import REFERENCE
from tests.trainers.test_evaluation import steps_of
from tests.trainers.test_reward import pairs
from tests.trainers.test_run import LIMIT_S, exit_of, launch
from tests.trainers.test_sft import equal, train
from trainers import merge
from trainers.folders.checkpoints import Checkpoint, list_checkpoints, verify

pytestmark = pytest.mark.long

OFFLOAD = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
    }
}
# As "zero3", but without the exception for small weights, which would be all of the tiny model's.
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
ASKED = {"eval_prompts": None, "eval_max_tokens": 6}
PAIRS = {"rows": pairs(24), "valid_rows": pairs(8, seed=1)}


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """What a run has trained: an adapter, or all."""
    (file,) = (run_dir / "output").glob("*.safetensors")
    return load_file(file)


def run_ranks(run_dir: Path, *, nproc: int = 2) -> dict[str, Any]:
    status = launch(run_dir, nproc=nproc).wait(LIMIT_S)
    assert status == 0, (run_dir / "stderr.log").read_text()[-3000:]
    return exit_of(run_dir)


@pytest.mark.parametrize(
    ("method", "zero", "more"),
    [
        ("supervised", "zero2", {"micro_batch_size": 1} | ASKED),  # in two passes
        ("supervised", ZERO3, {"gradient_checkpointing": True} | ASKED),
        ("supervised", "zero3", {}),
        ("supervised", OFFLOAD, {}),
        ("supervised", "zero2", {"load_in_4bit": True}),
        ("supervised", "zero2", {"load_in_8bit": True}),
        ("pretraining", ZERO3, {"rows": [{"text": f"Case {n}."} for n in range(200)], "n_valid": 0}),
        ("reward", ZERO3, PAIRS),
        ("reward", "zero2", PAIRS),
        ("dpo", ZERO3, PAIRS),
        ("dpo", "zero2", PAIRS),
        ("supervised", ZERO3, {"use_peft": False}),
        ("supervised", "zero2", {"use_peft": False}),
        ("dpo", ZERO3, PAIRS | {"use_peft": False}),
        ("supervised", ZERO3, {"modules_to_save": ["embed_tokens", "lm_head"]} | ASKED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sharded_ranks_learn_what_one_process_learns(
    make_run, curve_of, method: str, zero: Any, more: dict
) -> None:
    settings = {"method": method, "max_steps": 4, "micro_batch_size": 2, "learning_rate": 1e-3} | more
    one, two = make_run("1", **settings), make_run("2", nproc=2, deepspeed=zero, **settings)
    metrics_one, metrics_two = train(one)["metrics"], run_ranks(two)["metrics"]
    assert curve_of(two) == pytest.approx(curve_of(one), rel=1e-5)
    for name in (name for name in metrics_one if name.startswith("valid_")):
        assert metrics_two[name] == pytest.approx(metrics_one[name], rel=1e-4, abs=1e-5), name
    if "eval_prompts" in more:
        assert list(steps_of(two / "output")) == [0, 4]
        for step, facts in steps_of(two / "output").items():
            assert len(facts["answers"]) == 3
            assert facts["answers"] == steps_of(one / "output")[step]["answers"]
    whole, gathered = weights_of(one), weights_of(two)
    assert gathered.keys() == whole.keys()
    for name in whole:
        assert gathered[name].shape == whole[name].shape
        torch.testing.assert_close(gathered[name], whole[name], rtol=1e-4, atol=2e-5)
    report = merge.merge_run(two, out_dir=two / "merged")
    assert report["adapter_rel_effect"] > 100 * report["rms_rel_diff"]


@pytest.mark.parametrize(("zero", "use_peft"), [("zero2", True), (ZERO3, True), (ZERO3, False)])
def test_a_resumed_run_equals_the_uninterrupted_one(make_run, curve_of, zero: Any, use_peft: bool) -> None:
    """From the middle, after the last step, and not with another number of processes."""
    settings = {"deepspeed": zero, "use_peft": use_peft, "max_steps": 8, "micro_batch_size": 2}
    settings |= {"lora_dropout": 0.1} if use_peft else {}
    straight = make_run("1", nproc=2, **settings)
    whole = run_ranks(straight)
    kept = dict(list_checkpoints(straight / "checkpoints"))
    sealed = verify(kept[8])
    assert isinstance(sealed, Checkpoint)
    files = [entry["path"] for entry in sealed.manifest["files"]]
    assert sum("optim_states" in name for name in files) == 2
    assert not any(name.endswith(".py") for name in files)
    early = straight.parent / "early" / "checkpoints"
    shutil.copytree(kept[4], early / "step-4")

    second = make_run("2", nproc=2, resume_roots=(early,), **settings)
    end = run_ranks(second)
    assert end["resumed_from"] == 4
    late = {step: loss for step, loss in curve_of(straight).items() if step > 4}
    assert curve_of(second) == pytest.approx(late, rel=1e-6)
    assert equal(weights_of(second), weights_of(straight))
    assert end["metrics"]["valid_loss"] == pytest.approx(whole["metrics"]["valid_loss"], rel=1e-6)

    third = make_run("3", nproc=2, resume_roots=(straight / "checkpoints",), **settings)
    assert run_ranks(third)["resumed_from"] == 8
    assert curve_of(third) == {}
    assert equal(weights_of(third), weights_of(straight))

    alone = make_run("4", nproc=1, resume_roots=(straight / "checkpoints",), **settings)
    spec = json.loads((alone / "spec.json").read_text())
    spec["hyperparameters"] = json.loads((straight / "spec.json").read_text())["hyperparameters"]
    (alone / "spec.json").write_text(json.dumps(spec))
    assert launch(alone, nproc=1).wait(LIMIT_S) != 0
    assert exit_of(alone)["reason"] == "bad_checkpoint"
    assert "2 processes" in exit_of(alone)["message"]


@pytest.mark.parametrize("zero", ["zero2", ZERO3])
def test_half_precision_is_sharded_too(make_run, zero: Any) -> None:
    """Under ZeRO the adapter computes in bfloat16; its float32 copy is the optimizer's."""
    run_dir = make_run(
        nproc=2, deepspeed=zero, dtype="bfloat16", learning_rate=5e-3, gradient_checkpointing=True
    )
    metrics = run_ranks(run_dir)["metrics"]
    assert metrics["valid_loss"] < 0.98 * metrics["valid_loss_before"]
    merge.merge_run(run_dir, out_dir=run_dir / "merged")


def test_one_process_takes_the_configuration_of_the_reference(make_run) -> None:
    settings = {"dtype": "float16", "lr_scheduler_type": "linear", "max_steps": 3}
    run_dir = make_run(deepspeed=REFERENCE, n_valid=0, **settings)
    assert run_ranks(run_dir, nproc=1)["reason"] == "done"
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(run_dir).values())
