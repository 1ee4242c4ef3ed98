"""Turn an untrusted model (Hugging Face folder or GGUF file) into a registered model folder.

`python -m trainers.importer SOURCE OUT_DIR --report R.json`: OUT_DIR holds safetensors, config and tokenizer
only. Exit 0 with the facts in the report, or 3 with {"error": {"code", "message"}}.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainers.artifacts import Refused, count_bytes, digest_folder, publish_folder, report_outcome
from trainers.chat_template import TemplateRefused, check_chat_template, find_end_of_turn_ids

HEADER_LIMIT_BYTES = 100_000_000  # the safetensors format's own limit
JSON_LIMIT_BYTES = 256 << 20
PICKLED_SUFFIXES = {
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".joblib",
    ".npy",
    ".npz",
    ".h5",
    ".msgpack",
}
COPIED_NAMES = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
}
COPIED_SUFFIXES = {".safetensors", ".model"}  # .model: sentencepiece
CODE_KEYS = {"auto_map", "custom_generate", "custom_pipelines"}
KERNEL_KEYS = {
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
}


def import_model(source: Path, *, out_dir: Path) -> dict[str, Any]:
    """Copy or convert `source` into `out_dir` and return the report. Raises Refused."""
    if out_dir.exists():
        raise Refused("output_exists", f"{out_dir} already exists.")
    work_dir = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    try:
        if source.suffix == ".gguf":
            convert_gguf(source, work_dir)
        else:
            copy_folder(source, work_dir)
        report = inspect_model(work_dir)
        publish_folder(work_dir, out_dir)
    except BaseException:
        shutil.rmtree(work_dir, ignore_errors=True)
        raise
    return report


def copy_folder(source: Path, target: Path) -> None:
    """Copy the allow-listed files of a Hugging Face folder, after refusing what must not be near a model."""
    if not source.is_dir() or source.is_symlink():
        raise Refused("not_a_model", "The source is neither a folder nor a .gguf file.")
    for path in sorted(source.rglob("*")):
        if path.is_symlink():
            raise Refused("symlink", f"{path.relative_to(source)} is a symbolic link; copy the file itself.")
        if path.suffix.lower() in PICKLED_SUFFIXES:
            raise Refused(
                "unsafe_weights", f"{path.name} can hold code; only safetensors weights are accepted."
            )
    entries = sorted(source.iterdir())
    if "config.json" not in {path.name for path in entries}:
        raise Refused("not_a_model", "The folder has no config.json.")
    if not any(path.suffix == ".safetensors" for path in entries):
        raise Refused("no_safetensors", "The folder has no .safetensors weights.")
    for path in entries:
        if path.name not in COPIED_NAMES and path.suffix not in COPIED_SUFFIXES:
            continue
        if not path.is_file():
            raise Refused("not_a_model", f"{path.name} is not a regular file.")
        # O_NOFOLLOW: the file may have become a link since it was looked at.
        with (
            open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as reader,
            (target / path.name).open("wb") as writer,
        ):
            shutil.copyfileobj(reader, writer, 1 << 20)


def convert_gguf(source: Path, target: Path) -> None:
    """Write the GGUF file's model as bfloat16 safetensors, with its tokenizer and stop tokens."""
    if not source.is_file() or source.is_symlink():
        raise Refused("not_a_model", "The source is not a regular file.")
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise Refused("not_a_model", f"{source.name} is not a GGUF file.")
    import torch
    import transformers

    options: dict[str, Any] = {}
    if gguf_config := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = gguf_config(dequantize=True)  # else blocks may stay packed
    place = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
    with tempfile.TemporaryDirectory() as alone:  # from_pretrained would read the file's neighbours too
        (Path(alone) / "model.gguf").symlink_to(source.resolve())
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(alone, **place)
            packed = transformers.AutoModelForCausalLM.from_pretrained(
                alone, dtype=torch.bfloat16, **place, **options
            )
        except (ValueError, OSError, LookupError, RuntimeError, TypeError, AttributeError) as error:
            raise Refused("load_failed", f"The GGUF file does not load: {error}") from error
    config = packed.config
    config._name_or_path = ""
    vars(config).pop("quantization_config", None)
    vars(config).pop("_model_name_or_path", None)
    # save_pretrained refuses a model that came from GGUF, so its (dense) weights move to a fresh one.
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    del packed
    tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    for name in place:  # else save_pretrained writes how it was loaded
        tokenizer.init_kwargs.pop(name, None)
    stop_ids = list(dict.fromkeys([tokenizer.eos_token_id, *find_end_of_turn_ids_safely(tokenizer)]))
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[token_id for token_id in stop_ids if token_id is not None] or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def find_end_of_turn_ids_safely(tokenizer: Any) -> list[int]:
    """End-of-turn ids, after the template has proved harmless: looking for them renders it."""
    check_templates(tokenizer)
    return find_end_of_turn_ids(tokenizer)


def check_templates(tokenizer: Any) -> None:
    """Refuse the model when one of its chat templates misbehaves."""
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    for name, template in templates.items():
        try:
            check_chat_template(template, special_tokens=dict(tokenizer.special_tokens_map))
        except TemplateRefused as refused:
            raise Refused("bad_chat_template", f"{refused} (template {name!r})") from refused


def inspect_model(folder: Path) -> dict[str, Any]:
    """Check a copied folder from the cheapest test to the dearest and report what it is."""
    config = read_json(folder / "config.json")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            refuse_code(read_json(folder / name), name)
    check_model_type(config)
    headers = {path.name: read_safetensors_header(path) for path in sorted(folder.glob("*.safetensors"))}
    check_index(folder, set(headers))
    tokenizer = load_tokenizer(folder)
    check_templates(tokenizer)
    loaded = load_on_meta(folder)
    if len(tokenizer) > loaded.get_input_embeddings().weight.shape[0]:
        raise Refused("tokenizer_mismatch", "The tokenizer has more tokens than the model has embeddings.")
    text_config = loaded.config.get_text_config()
    return {
        "digest": digest_folder(folder),
        "bytes": count_bytes(folder),
        "model_type": config["model_type"],
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "context_length": getattr(text_config, "max_position_embeddings", None),
        "vocab_size": text_config.vocab_size,
        "has_chat_template": bool(tokenizer.chat_template),
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    if path.stat().st_size > JSON_LIMIT_BYTES:
        raise Refused("not_a_model", f"{path.name} is too large.")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise Refused("not_a_model", f"{path.name} is not valid JSON.") from None
    if not isinstance(value, dict):
        raise Refused("not_a_model", f"{path.name} is not a JSON object.")
    return value


def refuse_code(value: Any, file_name: str) -> None:
    """Refuse, at any depth, keys that make transformers import a model's own code or fetch a kernel."""
    for key, child in _walk_items(value):
        if key in CODE_KEYS and child:
            raise Refused("remote_code", f"{file_name} names code to run ({key}).")
        if key in KERNEL_KEYS and re.search(r"[/:]", str(child)):
            raise Refused("remote_code", f"{file_name} names a kernel to fetch ({key}).")


def _walk_items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield key, child
            yield from _walk_items(child)
    elif isinstance(value, list):
        for child in value:
            yield from _walk_items(child)


def check_model_type(config: dict[str, Any]) -> None:
    """Only architectures that the installed transformers implements itself, unquantized."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise Refused(
            "unknown_model_type", f"model_type {model_type!r} is not a known causal language model."
        )
    if config.get("quantization_config"):
        raise Refused(
            "quantized_model", "Quantized weights cannot be trained and merged; import the original."
        )


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; its declared size is checked before anything is read or parsed."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(HEADER_LIMIT_BYTES, size - 8):
            raise Refused("bad_safetensors", f"{path.name} declares a header of {header_bytes} bytes.")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError):
            raise Refused("bad_safetensors", f"The header of {path.name} is not JSON.") from None
    if not isinstance(header, dict):
        raise Refused("bad_safetensors", f"The header of {path.name} is not a JSON object.")
    return header


def check_index(folder: Path, weight_files: set[str]) -> None:
    """The index may name only files of this folder."""
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        return
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not set(weight_map.values()) <= weight_files:
        raise Refused("not_a_model", f"{index_path.name} names weights that are not in the folder.")


def load_tokenizer(folder: Path) -> Any:
    """The folder's own tokenizer; Refused when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise Refused("no_tokenizer", f"The tokenizer does not load: {error}") from error


def load_on_meta(folder: Path) -> Any:
    """Load every tensor's name and shape but no bytes: proves that the folder loads here, offline."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map="meta",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise Refused("bad_safetensors", f"The weights do not load: {error}") from error
    except (ValueError, OSError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        raise Refused("load_failed", f"The model does not load: {error}") from error
    model, info = loaded
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise Refused("load_failed", f"{len(lacking)} tensors are missing or misshapen: {lacking[0]} ...")
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers.importer", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return report_outcome(
        lambda: import_model(arguments.source, out_dir=arguments.out_dir), to=arguments.report
    )


if __name__ == "__main__":
    sys.exit(main())
