"""Importing an adapter: it is merged into the base it was trained on, and nothing else is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainers.importing import hostile
from tests.trainers.importing.hostile import edit_json
from tests.trainers.test_merge import write_adapter
from trainers.folders.artifacts import digest_folder
from trainers.importer import main


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    write_adapter(folder, base=tiny_model, scale=0.1)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="org/tiny")
    return folder


@pytest.fixture
def source(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "source"))


@pytest.fixture
def import_source(tiny_model: Path, tmp_path: Path) -> Callable[[Path], dict]:
    def run(source: Path) -> dict:
        report, out = tmp_path / "report.json", tmp_path / "out"
        argv = [str(source), str(out), "--report", str(report), "--base", str(tiny_model)]
        exit_code = main([*argv, "--base-name", "base", "--base-name", "tiny"])
        found = json.loads(report.read_text())
        assert exit_code == (3 if "error" in found else 0)
        assert out.exists() == (exit_code == 0)
        assert not list(tmp_path.glob("out.*"))
        return found

    return run


def test_an_adapter_is_merged_and_described(source, import_source, tiny_model, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    report = import_source(source)
    out = tmp_path / "out"
    expected = {"model_type": "llama", "context_length": 512, "digest": digest_folder(out)}
    assert report.items() >= expected.items()
    assert report["adapter_rel_effect"] > 0.1
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, source)(ids).logits
    assert (merged - after).norm() < 1e-4 * after.norm()
    assert (merged - before).norm() > 0.1 * before.norm()


def test_without_a_tokenizer_the_bases_is_used(source, import_source, tiny_model, tmp_path):
    for path in [*source.glob("tokenizer*"), source / "chat_template.jinja"]:
        path.unlink()
    assert "error" not in import_source(source)
    template = "chat_template.jinja"
    assert (tmp_path / "out" / template).read_bytes() == (tiny_model / template).read_bytes()


@pytest.mark.parametrize("name", ["", None, "base", "tiny", "someone/tiny", "/models/tiny/"])
def test_names_of_the_base(name, source, import_source):
    edit_json(source / "adapter_config.json", base_model_name_or_path=name)
    assert "error" not in import_source(source)


def for_another_shape(source: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "adapter_model.safetensors")
    wide = {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in tensors.items()}
    save_file(wide, source / "adapter_model.safetensors")


def save_a_module(shape: tuple[int, int], name: str = "lm_head", says: str = "lm_head"):
    def damage(source: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(source / "adapter_model.safetensors")
        tensors[f"base_model.model.{name}.weight"] = torch.zeros(shape)
        save_file(tensors, source / "adapter_model.safetensors")
        edit_json(source / "adapter_config.json", modules_to_save=[says])

    return damage


def as_pickle(source: Path) -> None:
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")


def without_weights(source: Path) -> None:
    (source / "adapter_model.safetensors").unlink()


def config(**changes: object) -> Callable[[Path], None]:
    return lambda source: edit_json(source / "adapter_config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (config(base_model_name_or_path="org/another"), "wrong_base"),
        (config(base_model_name_or_path=["org/tiny"]), "wrong_base"),
        (for_another_shape, "bad_adapter"),
        (config(r=8), "bad_adapter"),
        (config(r=0), "bad_adapter"),
        (config(r="four"), "bad_adapter"),
        (config(target_modules=["nowhere"]), "bad_adapter"),
        (config(target_modules=7), "bad_adapter"),
        (save_a_module((7, 7)), "bad_adapter"),
        (save_a_module((512, 64), "nowhere", "nowhere"), "bad_adapter"),
        (save_a_module((512, 64), "model.norm"), "bad_adapter"),
        (config(modules_to_save="all"), "bad_adapter"),
        (config(peft_type="IA3"), "unsupported_adapter"),
        (config(peft_type="evil"), "unsupported_adapter"),
        (config(task_type="SEQ_CLS"), "unsupported_adapter"),
        (config(auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}), "unsupported_adapter"),
        (config(megatron_config={"a": 1}, megatron_core="megatron.evil"), "unsupported_adapter"),
        (config(corda_config={"cache_file": "evil.pt"}), "unsupported_adapter"),
        (config(init_lora_weights="corda"), "unsupported_adapter"),
        (config(layer_replication=[[0, 10**9]]), "unsupported_adapter"),
        (config(auto_map={"AutoModel": "evil.Evil"}), "remote_code"),
        (as_pickle, "unsafe_weights"),
        (hostile.pickle_as("original/weights.pt"), "unsafe_weights"),
        (hostile.pickle_as("adapter_model.safetensors", instead=True), "bad_safetensors"),
        (hostile.pickle_as("adapter_config.json", instead=True), "not_a_model"),
        (hostile.link("adapter_model.safetensors", "/etc/passwd"), "symlink"),
        (without_weights, "no_adapter"),
        (
            hostile.set_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.E", None]}),
            "remote_code",
        ),
        (hostile.set_json("tokenizer_config.json", tokenizer_file="/etc/passwd"), "unsafe_tokenizer"),
        (hostile.write("chat_template.jinja", hostile.HANG), "bad_chat_template"),
        (hostile.write("tokenizer.json", "{}"), "no_tokenizer"),
    ],
)
def test_other_adapters_are_refused(damage, code, source, import_source, tmp_path):
    damage(source)
    assert import_source(source)["error"]["code"] == code
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def merge_in_order(tiny_model: Path, tmp_path: Path) -> Callable[..., dict]:
    def run(*adapters: Path, base: Path = tiny_model, out: str = "out") -> dict:
        first, *others = map(str, adapters)
        report = tmp_path / f"{out}.json"
        argv = [first, str(tmp_path / out), "--report", str(report), "--base", str(base), "--base-name=tiny"]
        main([*argv, *(f"--then={other}" for other in others)])
        return json.loads(report.read_text())

    return run


@pytest.fixture
def second(tiny_model: Path, tmp_path: Path) -> Path:
    """Another adapter, which calls its base by a name that nobody here knows."""
    folder = tmp_path / "second"
    write_adapter(folder, base=tiny_model, scale=0.1, seed=1)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="/elsewhere/outputs-pt-merged")
    return folder


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_adapters_in_order_make_what_merging_one_by_one_makes(source, second, merge_in_order, tmp_path):
    report = merge_in_order(source, second)
    merge_in_order(source, out="one")
    edit_json(second / "adapter_config.json", base_model_name_or_path="tiny")
    merge_in_order(second, base=tmp_path / "one", out="two")

    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "two")
    assert weights_of(tmp_path / "out") != weights_of(tmp_path / "one")
    assert len({facts["sha256"] for facts in report["adapters"]}) == 2
    assert all(facts["adapter_rel_effect"] > 0.1 for facts in report["adapters"])
    assert report["rms_rel_diff"] == max(facts["rms_rel_diff"] for facts in report["adapters"])
    assert not list(tmp_path.glob("out.*adapter*"))


def test_the_first_must_name_the_base_and_every_one_must_fit(source, second, merge_in_order, tmp_path):
    assert merge_in_order(second, source)["error"]["code"] == "wrong_base"
    for_another_shape(second)
    error = merge_in_order(source, second)["error"]
    assert error["code"] == "bad_adapter"
    assert error["message"].startswith("Adapter 2 of 2: ")
    assert not (tmp_path / "out").exists()


def test_tokens_that_the_first_brought_are_not_lost(tiny_model, second, merge_in_order, tmp_path):
    from transformers import AutoTokenizer

    first = tmp_path / "first"
    write_adapter(first, base=tiny_model, scale=0.1, modules_to_save=["embed_tokens", "lm_head"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    edit_json(first / "adapter_config.json", base_model_name_or_path="tiny")
    grown = widen(first, tokenizer)

    error = merge_in_order(first, second)["error"]
    assert (error["code"], "lacks tokens" in error["message"]) == ("bad_adapter", True)

    for path in [*second.glob("tokenizer*"), second / "chat_template.jinja"]:
        path.unlink()
    assert "error" not in merge_in_order(first, second)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == grown


def widen(adapter: Path, tokenizer) -> int:
    """Give the adapter two more tokens, as pretraining with new ones does; the tokens there are then."""
    import torch
    from safetensors.torch import load_file, save_file

    tokenizer.add_tokens(["angina", "dyspnoea"])
    tokenizer.save_pretrained(adapter)
    rows = max(tokenizer.get_vocab().values()) + 1
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_" not in name:
            more = max(rows - len(tensor), 0)
            tensors[name] = torch.cat([tensor, tensor.mean(0, keepdim=True).repeat(more, 1)])
    save_file(tensors, adapter / "adapter_model.safetensors")
    return len(tokenizer)
