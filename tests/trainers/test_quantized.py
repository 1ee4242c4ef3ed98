"""A LoRA on a base in 4 or 8 bits: it learns, resumes exactly, and is merged into the base as stored."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.trainers.test_reward import pairs
from tests.trainers.test_sft import StopAt, adapter_of, equal, train
from trainers import merge
from trainers.models.quantized import configure_quantization
from trainers.run import run
from trainers.specs import load_run_spec
from trainers.training.ranks import StopRequest

FLAGS = {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}}
DATA: dict[str, dict[str, Any]] = {
    "supervised": {},
    "pretraining": {
        "rows": [{"text": f"Case {n}: {n % 7} tablets were taken."} for n in range(80)],
        "valid_rows": [{"text": "Case 99: 3 tablets were taken."}] * 8,
        "block_size": 32,
    },
    "reward": {"rows": pairs(24), "valid_rows": pairs(8, seed=1)},
    "dpo": {"rows": pairs(24), "valid_rows": pairs(8, seed=1)},
    "kto": {"rows": pairs(24), "valid_rows": pairs(8, seed=1)},
}
long = pytest.mark.long


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        ("supervised", 4),
        ("supervised", 8),
        ("reward", 4),
        pytest.param("reward", 8, marks=long),
        pytest.param("dpo", 4, marks=long),
        pytest.param("dpo", 8, marks=long),
        pytest.param("kto", 4, marks=long),
        pytest.param("kto", 8, marks=long),
        pytest.param("pretraining", 4, marks=long),
        pytest.param("pretraining", 8, marks=long),
    ],
)
def test_an_adapter_on_a_quantized_base_learns_and_is_merged(
    make_run, tiny_model: Path, method: str, bits: int
) -> None:
    settings = DATA[method] | FLAGS[bits] | {"max_steps": 12, "learning_rate": 5e-3}
    run_dir = make_run(method=method, gradient_checkpointing=True, **settings)
    metrics = train(run_dir)["metrics"]
    assert metrics["valid_loss"] < 0.98 * metrics["valid_loss_before"]
    assert {tensor.dtype for tensor in adapter_of(run_dir / "output").values()} == {torch.float32}
    report = merge.merge_run(run_dir, out_dir=run_dir / "merged")
    assert [warning["code"] for warning in report["warnings"]] == ["trained_on_quantized_base"]
    assert f"in {bits} bits" in report["warnings"][0]["message"]
    assert report["adapter_rel_effect"] > 1000 * report["rms_rel_diff"]
    assert report["dtype"] == "float32"
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, run_dir / "merged"))
    assert {name: tensor.dtype for name, tensor in before.items()}.items() <= {
        name: tensor.dtype for name, tensor in after.items()
    }.items()
    assert "quantization_config" not in json.loads((run_dir / "merged" / "config.json").read_text())


@pytest.mark.parametrize("bits", [4, 8])
def test_all_but_the_head_and_the_embeddings_is_quantized(make_run, tiny_model: Path, bits: int) -> None:
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    settings = load_run_spec(make_run(**FLAGS[bits])).settings()
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, **configure_quantization(settings, dtype=torch.bfloat16)
    )
    kind = Linear4bit if bits == 4 else Linear8bitLt
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert type(linear.pop("score")) is torch.nn.Linear
    assert {type(module) for module in linear.values()} == {kind}
    if bits == 4:
        weight: Any = model.model.layers[0].mlp.up_proj.weight
        assert (weight.quant_type, weight.quant_state.nested) == ("nf4", True)
        assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_evaluating_does_not_change_the_training(make_run, curve_of) -> None:
    """In an evaluation bitsandbytes packs 4-bit weights for some CPUs, and their gradients are lost."""
    settings = FLAGS[4] | {"learning_rate": 1e-2, "max_steps": 8}
    with_validation, without = make_run("1", **settings), make_run("2", n_valid=0, **settings)
    train(with_validation)
    train(without)
    assert curve_of(with_validation) == curve_of(without)
    assert equal(adapter_of(with_validation / "output"), adapter_of(without / "output"))


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=long)])
def test_a_resumed_run_equals_the_uninterrupted_one(make_run, curve_of, bits: int) -> None:
    settings = FLAGS[bits] | {"lora_dropout": 0.1, "max_steps": 8}
    straight, first = make_run("1", **settings), make_run("2", **settings)
    train(straight)
    assert train(first, stop=StopAt(first, step=3))["reason"] == "stopped"
    second = make_run("3", resume_roots=(first / "checkpoints",), **settings)
    assert train(second)["resumed_from"] == 4
    assert curve_of(first) | curve_of(second) == curve_of(straight)
    assert equal(adapter_of(second / "output"), adapter_of(straight / "output"))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_every_precision_trains_float32_adapters(make_run, events_of, bits: int, dtype: str) -> None:
    run_dir = make_run(dtype=dtype, max_steps=3, n_valid=0, **FLAGS.get(bits, {}))
    assert train(run_dir)["reason"] == "done"
    assert {tensor.dtype for tensor in adapter_of(run_dir / "output").values()} == {torch.float32}
    (told,) = [e["data"] for e in events_of(run_dir, "message") if e["data"].get("code") == "configured"]
    without_gpu = "bfloat16" if dtype == "float16" else dtype
    assert told["dtype"] == (dtype if torch.cuda.is_available() else without_gpu)


def test_a_machine_without_bitsandbytes_says_so(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python marks what cannot be imported
    run_dir = make_run(**FLAGS[4])
    assert run(run_dir, stop=StopRequest()) == 3
    end = json.loads((run_dir / "exit.json").read_text())
    assert end["reason"] == "bad_data"
    assert "load_in_4bit needs bitsandbytes" in end["message"]
    assert not (run_dir / "output").exists()
