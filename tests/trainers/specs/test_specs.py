"""What a user may ask for, and what "auto" comes to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.specs import METHODS, RunSpec, SpecError, load_run_spec, parse_method, resolve

PATH = "method.supervised.hyperparameters"


def ask(**hyperparameters: object) -> dict:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def test_both_places_for_hyperparameters_mean_the_same() -> None:
    assert parse_method(ask(n_epochs=2), None) == parse_method(None, {"n_epochs": 2})


def test_names_of_the_reference_are_ours() -> None:
    given = {"num_train_epochs": 5.0, "lora_r": 8, "torch_dtype": "bf16", "lora_target": "q_proj, v_proj"}
    asked = parse_method(None, given).hyperparameters
    assert (asked.n_epochs, asked.lora_rank, asked.dtype) == (5, 8, "bfloat16")
    assert asked.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("method", "top", "param", "code", "part"),
    [
        (ask(n_epoch=1), None, f"{PATH}.n_epoch", "unknown_parameter", "'n_epochs'"),
        (None, {"n_epochs": 51}, "hyperparameters.n_epochs", "invalid_value", "50"),
        (None, {"n_epochs": "many"}, "hyperparameters.n_epochs", "invalid_value", '"auto" or a number'),
        (None, {"n_epochs": True}, "hyperparameters.n_epochs", "invalid_value", "number"),
        (None, {"learning_rate": float("nan")}, "hyperparameters.learning_rate", "invalid_value", "finite"),
        (None, {"lr": 0.1, "learning_rate": 0.2}, "hyperparameters.learning_rate", "invalid_value", "lr"),
        (ask(n_epochs=1), {"n_epochs": 1}, "hyperparameters", "invalid_value", "twice"),
        (None, {"seed": -2}, "hyperparameters.seed", "invalid_value", "0"),
        (None, {"fp16": 1}, "hyperparameters.fp16", "invalid_value", "true or false"),
        (None, {"fp16": True, "bf16": True}, "hyperparameters.bf16", "invalid_value", "fp16"),
        ({"type": "ppo9"}, None, "method.type", "unsupported_value", "supervised"),
        ({"type": ["ppo"]}, None, "method.type", "unsupported_value", "supervised"),
        ({"supervised": {}}, None, "method.type", "missing_required_parameter", "missing"),
    ],
)
def test_a_wrong_wish_is_refused_by_name(
    method: dict | None, top: dict | None, param: str | None, code: str, part: str
) -> None:
    with pytest.raises(SpecError) as caught:
        parse_method(method, top)
    assert caught.value.code == code
    assert part in caught.value.message
    if param:
        assert caught.value.param == param


def test_what_the_service_decides_is_accepted_and_said_to_be_ignored() -> None:
    reference = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "fp16": True,
        "bf16": False,
        "output_dir": "outputs-sft",
        "device_map": "auto",
        "report_to": "tensorboard",
        "target_modules": "q_proj,v_proj,k_proj,o_proj",
    }
    method = parse_method(ask(**reference), None)
    assert method.ignored.keys() == {"output_dir", "device_map", "report_to"}
    resolved = resolve(method, n_examples=80, seed=1, nproc_per_node=2)
    assert (resolved["micro_batch_size"], resolved["batch_size"], resolved["dtype"]) == (4, 16, "float16")
    assert parse_method(method.to_request(), None).hyperparameters == method.hyperparameters


def test_a_batch_is_said_in_one_way() -> None:
    both = parse_method(None, {"batch_size": 8, "gradient_accumulation_steps": 2})
    with pytest.raises(SpecError, match="give one"):
        resolve(both, n_examples=80, seed=1)


@pytest.mark.parametrize("kind", METHODS.values(), ids=lambda kind: kind.name)
def test_every_method_has_its_own_parameters_and_resolves(kind) -> None:
    resolved = resolve(parse_method({"type": kind.name}, None), n_examples=80, seed=1)
    assert resolved.keys() == kind.resolved.model_fields.keys()
    assert kind.row_length(kind.resolved.model_validate(resolved)) > 0
    with pytest.raises(SpecError) as caught:
        parse_method({"type": kind.name, kind.name: {"hyperparameters": {"lora_ranks": 1}}}, None)
    assert caught.value.param == f"method.{kind.name}.hyperparameters.lora_ranks"


def test_resolve_leaves_auto_only_to_the_machine() -> None:
    resolved = resolve(parse_method(None, None), n_examples=80, seed=1)
    assert {name for name, value in resolved.items() if value == "auto"} == {
        "dtype",
        "gradient_checkpointing",
    }
    assert resolved == resolve(parse_method(None, None), n_examples=80, seed=1)
    json.dumps(resolved, allow_nan=False)


def test_learning_rate_wins_over_its_multiplier() -> None:
    resolved = resolve(
        parse_method(None, {"learning_rate": 1e-4, "learning_rate_multiplier": 9}), n_examples=10, seed=1
    )
    assert resolved["learning_rate"] == 1e-4
    usual = METHODS["supervised"].base_learning_rate
    assert resolved["learning_rate_multiplier"] == pytest.approx(1e-4 / usual)


@pytest.mark.parametrize("nproc", [1, 2, 3, 8])
@pytest.mark.parametrize("n_examples", [1, 7, 500, 40_000])
def test_auto_batches_divide_over_the_processes(n_examples: int, nproc: int) -> None:
    resolved = resolve(parse_method(None, None), n_examples=n_examples, seed=1, nproc_per_node=nproc)
    assert resolved["batch_size"] % (resolved["micro_batch_size"] * nproc) == 0


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SpecError, match="not a multiple"):
        resolve(parse_method(None, {"batch_size": 5}), n_examples=9, seed=1, nproc_per_node=2)


def test_run_spec_survives_its_file(make_run, tmp_path: Path) -> None:
    run_dir = make_run()
    spec = load_run_spec(run_dir)
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    body = json.loads((run_dir / "spec.json").read_text())
    for broken in ({**body, "surprise": 1}, {**body, "model_dir": "relative"}, {**body, "method": "ppo9"}):
        (run_dir / "spec.json").write_text(json.dumps(broken))
        with pytest.raises(SpecError):
            load_run_spec(run_dir)
    with pytest.raises(SpecError, match="does not exist"):
        load_run_spec(tmp_path)


def test_light_modules_import_nothing_heavy() -> None:
    code = (
        "import sys, trainers.specs, trainers.rows.files, trainers.validate\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
