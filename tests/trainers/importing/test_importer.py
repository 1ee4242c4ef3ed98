"""Importing a model: what is copied, what is refused, and that nothing of the source ever runs."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainers.importing.hostile import HANG
from trainers.folders.artifacts import digest_folder
from trainers.importer import main
from trainers.models.chat_template import check_chat_template, find_end_of_turn_ids


@pytest.fixture
def source(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "source"))


@pytest.fixture
def import_source(tmp_path: Path) -> Callable[[Path], dict]:
    def run(source: Path) -> dict:
        exit_code = main([str(source), str(tmp_path / "out"), "--report", str(tmp_path / "report.json")])
        report = json.loads((tmp_path / "report.json").read_text())
        assert exit_code == (3 if "error" in report else 0)
        assert (tmp_path / "out").exists() == (exit_code == 0)
        assert not (tmp_path / "out.tmp").exists()
        return report

    return run


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folder_is_copied_and_described(source, import_source, tmp_path):
    (source / "README.md").write_text("not copied")
    (source / "modeling_evil.py").write_text("not copied")
    report = import_source(source)
    assert report == {
        "digest": digest_folder(tmp_path / "out"),
        "bytes": sum(path.stat().st_size for path in (tmp_path / "out").iterdir()),
        "model_type": "llama",
        "parameters": report["parameters"],
        "context_length": 512,
        "vocab_size": 512,
        "has_chat_template": True,
        "dtype": "float32",
    }
    assert 50_000 < report["parameters"] < 500_000
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_digest_knows_names_and_bytes_only(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file_name in ("b", "a") if name == "one" else ("a", "b"):
            (tmp_path / name / file_name).write_text(file_name)
    os.utime(tmp_path / "two" / "a", (0, 0))
    first = digest_folder(tmp_path / "one")
    assert first == digest_folder(tmp_path / "two")
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "c")
    assert first != digest_folder(tmp_path / "two")


def test_existing_output_is_kept(source, tmp_path):
    (tmp_path / "out").mkdir()
    report = tmp_path / "report.json"
    assert main([str(source), str(tmp_path / "out"), "--report", str(report)]) == 3
    assert json.loads(report.read_text())["error"]["code"] == "output_exists"


def remove_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def add_pickle(source: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(source.parent / "canary"),)

    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def add_nested_pickle(source: Path) -> None:
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"")


def _write_canary_code(source: Path) -> None:
    code = f"import os\nos.mkdir({str(source.parent / 'canary')!r})\n"
    (source / "evil.py").write_text(code)


def add_auto_map(source: Path) -> None:
    _write_canary_code(source)
    edit_json(source / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})


def add_tokenizer_auto_map(source: Path) -> None:
    _write_canary_code(source)
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})


def add_nested_auto_map(source: Path) -> None:
    edit_json(source / "config.json", text_config={"deep": [{"auto_map": {"AutoConfig": "evil.Evil"}}]})


def add_kernel(source: Path) -> None:
    edit_json(source / "config.json", attn_implementation="someone/kernel")


def change_model_type(source: Path) -> None:
    edit_json(source / "config.json", model_type="evil")


def quantize(source: Path) -> None:
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq"})


def link_weights(source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "elsewhere")
    (source / "model.safetensors").symlink_to(source.parent / "elsewhere")


def declare_huge_header(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def truncate_weights(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"\x00" + path.read_bytes()[9:])


def empty_the_weights(source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"")


def drop_a_tensor(source: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def widen_the_model(source: Path) -> None:
    edit_json(source / "config.json", intermediate_size=256)


def point_index_outside(source: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../../elsewhere.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def remove_config(source: Path) -> None:
    (source / "config.json").unlink()


def break_config(source: Path) -> None:
    (source / "config.json").write_text("{")


def remove_tokenizer(source: Path) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()


def hang_template(source: Path) -> None:
    (source / "chat_template.jinja").write_text(HANG)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (remove_weights, "no_safetensors"),
        (add_pickle, "unsafe_weights"),
        (add_nested_pickle, "unsafe_weights"),
        (add_auto_map, "remote_code"),
        (add_tokenizer_auto_map, "remote_code"),
        (add_nested_auto_map, "remote_code"),
        (add_kernel, "remote_code"),
        (change_model_type, "unknown_model_type"),
        (quantize, "quantized_model"),
        (link_weights, "symlink"),
        (declare_huge_header, "bad_safetensors"),
        (truncate_weights, "bad_safetensors"),
        (damage_header, "bad_safetensors"),
        (empty_the_weights, "bad_safetensors"),
        (drop_a_tensor, "load_failed"),
        (widen_the_model, "load_failed"),
        (point_index_outside, "not_a_model"),
        (remove_config, "not_a_model"),
        (break_config, "not_a_model"),
        (remove_tokenizer, "no_tokenizer"),
        (hang_template, "bad_chat_template"),
    ],
)
def test_unsafe_or_broken_sources_are_refused(damage, code, source, import_source, tmp_path):
    damage(source)
    assert import_source(source)["error"]["code"] == code
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["missing", "missing.gguf"])
def test_missing_source_is_refused(name, import_source, tmp_path):
    assert import_source(tmp_path / name)["error"]["code"] == "not_a_model"


def test_a_file_named_gguf_that_is_none_is_refused(import_source, tmp_path):
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04")
    assert import_source(tmp_path / "fake.gguf")["error"]["code"] == "not_a_model"
    (tmp_path / "fake.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    assert import_source(tmp_path / "fake.gguf")["error"]["code"] == "bad_gguf"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ bos_token }}{{ m['content'] | trim }}{% endfor %}",
        # Some families know no system role, and say so.
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}{% endfor %}",
        "{{ strftime_now('%Y') }}{% for m in messages %}{% if not loop.first %}{% break %}{% endif %}"
        "{{ m.content }}{% endfor %}",
        # Knows calls only as texts; rows with tools are refused when they are rendered.
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls %}"
        "{{ '' + call.function.arguments }}{% endfor %}{% endfor %}",
    ],
)
def test_honest_templates_pass(template):
    check_chat_template(template, special_tokens={"bos_token": "<s>"})


def test_end_of_turn_differs_from_eos(source):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.eos_token = "<|endoftext|>"
    assert find_end_of_turn_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokenizer.chat_template = None
    assert find_end_of_turn_ids(tokenizer) == []


def write_gguf(path: Path, *, model_dir: Path, leave_out: str = "?", **declared: int) -> None:
    """The tiny llama as llama.cpp would store it: other names, rotated heads, its own tokenizer format.

    Tensors whose name holds `leave_out` are; `declared` is what the file says instead of the truth.
    """
    import gguf
    from safetensors.torch import load_file

    config = json.loads((model_dir / "config.json").read_text())
    said = config | declared
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(said["hidden_size"])
    writer.add_block_count(said["num_hidden_layers"])
    writer.add_feed_forward_length(said["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(said["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token, _ in vocabulary]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)  # as in many files: the end of turn is known to the template only
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template((model_dir / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        if leave_out in name:
            continue
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        for part, n_heads in heads.items():
            if part in name:
                tensor = tensor.view(n_heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_the_same_model(tiny_model, import_source, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf", model_dir=tiny_model)
    report = import_source(tmp_path / "tiny.gguf")
    assert report == report | {"model_type": "llama", "dtype": "bfloat16", "context_length": 512}
    out = tmp_path / "out"
    expected = {
        name: tensor.bfloat16() for name, tensor in load_file(tiny_model / "model.safetensors").items()
    }
    written = load_file(out / "model.safetensors")
    assert written.keys() == expected.keys()  # tied: no lm_head
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    before, after = AutoTokenizer.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(out)
    text = "<|im_start|>user\nPatient 3 has a fever.<|im_end|>\n"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_gguf_with_a_tensor_missing_is_refused(tiny_model, import_source, tmp_path):
    """The loader would make the tensor up."""
    write_gguf(tmp_path / "tiny.gguf", model_dir=tiny_model, leave_out="layers.1.mlp.up_proj")
    assert import_source(tmp_path / "tiny.gguf")["error"]["code"] == "load_failed"


@pytest.mark.long
def test_command_line(source, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "trainers.importer",
            source,
            tmp_path / "out",
            "--report",
            tmp_path / "r.json",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["digest"] == digest_folder(tmp_path / "out")
