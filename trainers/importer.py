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
from pathlib import Path
from typing import Any

from trainers.folders.artifacts import Refused, publish_folder, report_outcome
from trainers.importing.checks import (
    check_counts,
    check_templates,
    name_templates,
)
from trainers.importing.files import copy_allowed_files, refuse_unsafe_files
from trainers.importing.gguf_header import read_gguf_header
from trainers.importing.loading import (
    find_end_of_turn_ids_safely,
    inspect_model,
    load_or_refuse,
    load_whole,
)

# What may be allocated: loading needs this much, and a packed GGUF weight takes up to 16 times its size. A
# small file can declare a model of any size.
MEMORY_LIMIT_BYTES = 4 << 30
MEMORY_A_SOURCE_BYTE = 16


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
        from trainers.importing.adapter import import_adapters

        return import_adapters(
            [arguments.source, *arguments.then],
            base_dir=arguments.base,
            base_names=set(arguments.base_name),
            out_dir=arguments.out_dir,
        )

    return report_outcome(work, to=arguments.report)


if __name__ == "__main__":
    sys.exit(main())
