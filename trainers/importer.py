"""Turn an untrusted model (Hugging Face folder or GGUF file) into a registered model folder.

`python -m trainers.importer SOURCE OUT_DIR --report R.json`: OUT_DIR holds safetensors, config and tokenizer
only. Exit 0 with the facts in the report, or 3 with {"error": {"code", "message"}}. With `--base DIR` SOURCE
is an adapter, which is merged into the model in DIR; `--base-name` is what the adapter may call it. Each
`--then DIR` is another adapter, merged into the result of the one before.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trainers.artifacts import Refused, count_bytes, digest_folder, publish_folder, report_outcome
from trainers.chat_template import find_end_of_turn_ids
from trainers.gguf_header import read_gguf_header
from trainers.import_checks import (
    SETTINGS_NAMES,
    check_counts,
    check_index,
    check_templates,
    check_tokenizer_config,
    name_templates,
    read_json,
    read_safetensors_header,
    read_special_tokens,
    read_templates,
    refuse_code,
)
from trainers.import_files import copy_allowed_files, refuse_unsafe_files

# What may be allocated: loading needs this much, and a packed GGUF weight takes up to 16 times its size. A
# small file can declare a model of any size.
MEMORY_LIMIT_BYTES = 4 << 30
MEMORY_A_SOURCE_BYTE = 16
_LOAD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
Loaded = TypeVar("Loaded")


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
    refuse_unsafe_files(source)
    names = {path.name for path in source.iterdir()}
    if "adapter_config.json" in names:
        raise Refused("adapter_needs_base", "The folder holds an adapter; name the `base` it belongs to.")
    if "config.json" not in names:
        raise Refused("not_a_model", "The folder has no config.json.")
    if not any(name.endswith(".safetensors") for name in names):
        raise Refused("no_safetensors", "The folder has no .safetensors weights.")
    copy_allowed_files(source, target)


def convert_gguf(source: Path, target: Path) -> None:
    """Write the GGUF file's model as bfloat16 safetensors, with its tokenizer and stop tokens."""
    if not source.is_file() or source.is_symlink():
        raise Refused("not_a_model", "The source is not a regular file.")
    header = read_gguf_header(source)
    check_counts(header.values, n_tensors=header.n_tensors)
    template = header.values.get("tokenizer.chat_template")
    check_templates(name_templates(template), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    import torch
    import transformers

    options: dict[str, Any] = {}
    if gguf_config := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = gguf_config(dequantize=True)  # else blocks may stay packed
    place = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
    with tempfile.TemporaryDirectory() as alone:  # from_pretrained would read the file's neighbours too
        (Path(alone) / "model.gguf").symlink_to(source.resolve())
        tokenizer = load_or_refuse(
            lambda: transformers.AutoTokenizer.from_pretrained(alone, **place), code="no_tokenizer"
        )
        packed = load_whole(alone, dtype=torch.bfloat16, **place, **options)
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
    check_loaded_templates(tokenizer)
    return find_end_of_turn_ids(tokenizer)


def check_loaded_templates(tokenizer: Any, *, checked: tuple[Any, Any] = (None, None)) -> None:
    """Check the templates as they were loaded, unless these, with these tokens, are what was `checked`."""
    templates = name_templates(tokenizer.chat_template)
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if templates and "default" not in templates:
        raise Refused("bad_chat_template", "The model has chat templates, but none named 'default'.")
    if (templates, tokens) != checked:
        check_templates(templates, special_tokens=tokens)


def inspect_model(folder: Path) -> dict[str, Any]:
    """Check a copied folder from the cheapest test to the dearest and report what it is."""
    for path in sorted(folder.glob("*.json")):
        value = read_json(path)
        if path.name in SETTINGS_NAMES:
            refuse_code(value, path.name)
    config = read_json(folder / "config.json")
    check_tokenizer_config(folder)
    headers = {path.name: read_safetensors_header(path) for path in sorted(folder.glob("*.safetensors"))}
    check_index(folder, set(headers))
    check_counts(config, n_tensors=sum(map(len, headers.values())))
    templates, special_tokens = read_templates(folder), read_special_tokens(folder)
    check_templates(templates, special_tokens=special_tokens)
    check_model_type(config)  # from here on transformers is needed
    load_config(folder)
    tokenizer = load_tokenizer(folder)
    check_loaded_templates(tokenizer, checked=(templates, special_tokens))
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


def check_model_type(config: dict[str, Any]) -> None:
    """Only architectures that the installed transformers implements itself, unquantized."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise Refused(
            "unknown_model_type", f"model_type {str(model_type)[:80]!r} is not a known causal language model."
        )
    if config.get("quantization_config"):
        raise Refused(
            "quantized_model", "Quantized weights cannot be trained and merged; import the original."
        )


def load_or_refuse(load: Callable[[], Loaded], *, code: str = "load_failed") -> Loaded:
    """What `load` returns. Raises Refused with `code` when the files, and not this program, are at fault."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    what = "tokenizer" if code == "no_tokenizer" else "model"
    try:
        return load()
    except SafetensorError as error:
        raise Refused("bad_safetensors", f"The weights do not load: {error}") from error
    except (*_LOAD_ERRORS, StrictDataclassError) as error:
        raise Refused(code, f"The {what} does not load: {_first_line(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library knows no class of its own
            raise
        raise Refused(code, f"The {what} does not load: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def load_config(folder: Path) -> Any:
    """The model's settings as its class understands them; first, since the tokenizer reads them too."""
    from transformers import AutoConfig

    return load_or_refuse(
        lambda: AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    )


def load_tokenizer(folder: Path) -> Any:
    """The folder's own tokenizer; Refused when there is none."""
    from transformers import AutoTokenizer

    return load_or_refuse(
        lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        code="no_tokenizer",
    )


def load_on_meta(folder: Path) -> Any:
    """Load every tensor's name and shape but no bytes: proves that the folder loads here, offline."""
    return load_whole(
        folder,
        dtype="auto",
        device_map="meta",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )


def load_whole(folder: Path | str, **options: Any) -> Any:
    """The model in `folder`. Raises Refused also when tensors are missing, which would be made up."""
    from transformers import AutoModelForCausalLM

    loaded: Any = load_or_refuse(
        lambda: AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    )
    model, info = loaded
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise Refused("load_failed", f"{len(lacking)} tensors are missing or misshapen: {lacking[0]} ...")
    return model


def limit_memory(source: Path) -> None:
    """Bound what this process may allocate by what `source` can need; reading its files is not counted."""
    files = source.rglob("*") if source.is_dir() else [source]
    source_bytes = sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())
    limit_bytes = MEMORY_LIMIT_BYTES + MEMORY_A_SOURCE_BYTE * source_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers.importer", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--base-name", action="append", default=[])
    parser.add_argument("--then", type=Path, action="append", default=[])
    arguments = parser.parse_args(argv)
    if argv is None:  # a process of its own
        os.nice(10)  # nobody waits for an import as they do for an answer
    if argv is None and arguments.base is None:
        limit_memory(arguments.source)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def work() -> dict[str, Any]:
        if arguments.base is None:
            return import_model(arguments.source, out_dir=arguments.out_dir)
        from trainers.import_adapter import import_adapters

        return import_adapters(
            [arguments.source, *arguments.then],
            base_dir=arguments.base,
            base_names=set(arguments.base_name),
            out_dir=arguments.out_dir,
        )

    return report_outcome(work, to=arguments.report)


if __name__ == "__main__":
    sys.exit(main())
