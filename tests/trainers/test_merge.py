"""Merging an adapter: the merged folder is base + adapter, and every way of being wrong is noticed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainers import merge
from trainers.folders.artifacts import digest_folder
from trainers.specs import RunSpec, parse_method, resolve


@pytest.fixture(scope="session")
def bfloat16_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "bfloat16"))
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(str(folder))
    return folder


def write_adapter(folder: Path, *, base: Path, scale: float, seed: int = 0, **options) -> None:
    """An adapter as training would leave it: B is zero at first, `scale` is how far it went."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    adapted.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A finished run: spec.json and output/ with an adapter."""

    def make(base: Path, *, scale: float = 0.1, digest: str | None = None) -> Path:
        run_dir = tmp_path / "run"
        write_adapter(run_dir / "output", base=base, scale=scale)
        hyperparameters = resolve(parse_method(None, None), n_examples=10, seed=1)
        spec = RunSpec(
            job_id="ftjob-1",
            attempt=1,
            method="supervised",
            hyperparameters=hyperparameters,
            seed=1,
            model_dir=base,
            model_id="tiny",
            model_digest=digest_folder(base) if digest is None else digest,
            train_file=tmp_path / "train",
            cache_dir=tmp_path / "cache",
        )
        (run_dir / "spec.json").write_text(spec.model_dump_json())
        return run_dir

    return make


@pytest.fixture
def merge_run(tmp_path: Path) -> Callable[[Path], dict]:
    def run(run_dir: Path) -> dict:
        exit_code = merge.main(
            [str(run_dir), str(tmp_path / "out"), "--report", str(tmp_path / "report.json")]
        )
        report = json.loads((tmp_path / "report.json").read_text())
        assert exit_code == (3 if "error" in report else 0)
        assert (tmp_path / "out").exists() == (exit_code == 0)
        assert not (tmp_path / "out.tmp").exists()
        return report

    return run


@pytest.mark.parametrize(("fixture", "dtype"), [("tiny_model", "float32"), ("bfloat16_model", "bfloat16")])
def test_merged_model_is_base_plus_adapter(fixture, dtype, request, make_run, merge_run, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = request.getfixturevalue(fixture)
    run_dir = make_run(base)
    report = merge_run(run_dir)
    out = tmp_path / "out"
    assert report["dtype"] == dtype
    assert report["digest"] == digest_folder(out)
    assert report["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    whole = AutoModelForCausalLM.from_pretrained(out)
    assert report["parameters"] == sum(parameter.numel() for parameter in whole.parameters())
    known = (report["model_type"], report["context_length"], report["vocab_size"])
    assert known == ("llama", 512, whole.config.vocab_size)
    assert report["rms_rel_diff"] < {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    assert report["adapter_rel_effect"] > 0.1
    assert report["warnings"] == []
    # The same, by hand and in double precision, without the code under test.
    ids = AutoTokenizer.from_pretrained(out)("Patient 7 has a fever.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        before = plain(ids).logits
        after = PeftModel.from_pretrained(plain, run_dir / "output").double()(ids).logits
    assert (merged - after).norm() < {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * after.norm()
    assert (merged - before).norm() > 0.1 * before.norm()


def test_merged_folder_is_whole(tiny_model, make_run, merge_run, tmp_path):
    from safetensors import safe_open

    run_dir = make_run(tiny_model)
    merge_run(run_dir)
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_bytes() == (
        run_dir / "output" / "chat_template.jinja"
    ).read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not any("lora_" in name for name in names)
    assert "lm_head.weight" not in names  # tied: stored once
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


def test_stop_tokens_of_the_template_are_added(tiny_model, make_run, merge_run, tmp_path):
    """A base model knows <|endoftext|> only; what was trained on chats ends its turns with <|im_end|>."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    settings = {"eos_token_id": 0, "temperature": 0.6, "do_sample": False}  # contradictory, as many bases are
    (base / "generation_config.json").write_text(json.dumps(settings))
    merge_run(make_run(base))
    merged = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert merged == settings | {"eos_token_id": [0, 2]}


def test_untrained_adapter_is_a_warning(tiny_model, make_run, merge_run):
    report = merge_run(make_run(tiny_model, scale=0))
    assert [warning["code"] for warning in report["warnings"]] == ["merge_is_identity"]
    assert report["max_abs_diff"] == 0


def test_an_adapter_below_the_base_precision_is_a_warning(bfloat16_model, make_run, merge_run):
    report = merge_run(make_run(bfloat16_model, scale=1e-4))
    assert [warning["code"] for warning in report["warnings"]] == ["merge_loses_precision"]


def test_another_base_is_refused(tiny_model, make_run, merge_run):
    assert merge_run(make_run(tiny_model, digest="0" * 64))["error"]["code"] == "wrong_base"


def test_empty_digest_skips_the_check(tiny_model, make_run, merge_run):
    assert "error" not in merge_run(make_run(tiny_model, digest=""))


def test_run_without_spec_is_refused(merge_run, tmp_path):
    (tmp_path / "run").mkdir()
    assert merge_run(tmp_path / "run")["error"]["code"] == "bad_run"


def drop_adapter_tensor(output: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(output / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, output / "adapter_model.safetensors")


def change_rank(output: Path) -> None:
    path = output / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))


def truncate_adapter(output: Path) -> None:
    path = output / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickle_adapter(output: Path) -> None:
    (output / "adapter_model.safetensors").rename(output / "adapter_model.bin")


def remove_tokenizer(output: Path) -> None:
    for path in output.glob("tokenizer*"):
        path.unlink()


def add_tokens(output: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output)
    tokenizer.add_tokens([f"<|new {i}|>" for i in range(300)])
    tokenizer.save_pretrained(output)


def poison_adapter(output: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(output / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, output / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (drop_adapter_tensor, "bad_adapter"),
        (change_rank, "bad_adapter"),
        (truncate_adapter, "bad_adapter"),
        (pickle_adapter, "no_adapter"),
        (remove_tokenizer, "no_tokenizer"),
        (poison_adapter, "nan_weights"),
        (add_tokens, "bad_adapter"),
    ],
)
def test_damaged_output_is_refused(damage, code, tiny_model, make_run, merge_run):
    run_dir = make_run(tiny_model)
    damage(run_dir / "output")
    assert merge_run(run_dir)["error"]["code"] == code


@pytest.mark.parametrize("fixture", ["tiny_model", "bfloat16_model"])
def test_wrong_arithmetic_is_noticed(fixture, request, make_run, merge_run, monkeypatch):
    from peft.tuners.lora import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: right(self, adapter) * 1.1)
    assert (
        merge_run(make_run(request.getfixturevalue(fixture), scale=0.5))["error"]["code"] == "merge_mismatch"
    )


def test_merging_nothing_is_noticed(bfloat16_model, make_run, merge_run, monkeypatch):
    """Even when the adapter's effect is within the tolerance."""
    from peft.tuners.lora import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: right(self, adapter) * 0)
    assert merge_run(make_run(bfloat16_model, scale=1e-3))["error"]["code"] == "merge_lost"


def test_damage_between_saving_and_reading_is_noticed(tiny_model, make_run, merge_run, monkeypatch):
    from safetensors.torch import load_file, save_file

    right = merge.save_merged

    def save_and_damage(model, folder, **options):
        right(model, folder, **options)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 1e-6
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merge, "save_merged", save_and_damage)
    assert merge_run(make_run(tiny_model))["error"]["code"] == "reload_mismatch"


@pytest.mark.long
def test_command_line(bfloat16_model, make_run, tmp_path):
    command = [sys.executable, "-m", "trainers.merge", make_run(bfloat16_model), tmp_path / "out"]
    done = subprocess.run(
        [*command, "--report", tmp_path / "r.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["digest"] == digest_folder(tmp_path / "out")
