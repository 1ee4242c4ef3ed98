"""Turn untrusted LoRA adapters (PEFT folders) and their base into a registered model folder."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.folders.artifacts import Refused, digest_file
from trainers.importing.checks import (
    VOCABULARY_NAMES,
    check_templates,
    check_tokenizer_config,
    read_json,
    read_safetensors_header,
    read_special_tokens,
    read_templates,
    refuse_code,
)
from trainers.importing.files import copy_allowed_files, refuse_unsafe_files
from trainers.importing.loading import check_loaded_templates, inspect_model, load_tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings that import a module, read files of their own, or make another model of the base.
_UNSUPPORTED_SETTINGS = (
    "alora_invocation_tokens",
    "arrow_config",
    "auto_mapping",
    "corda_config",
    "eva_config",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")  # others change the base's weights too


def import_adapters(
    adapters: Sequence[Path], *, base_dir: Path, base_names: set[str], out_dir: Path
) -> dict[str, Any]:
    """Merge each of `adapters` into the result of the one before, the first into the model in `base_dir`.

    Writes `out_dir` and returns the report. base_names: what the config of the first may call its base; what
    it made had no name here. Raises Refused.
    """
    from trainers.merge import merge_adapters  # imports torch, which a hostile folder must not cost

    copies = [out_dir.with_name(f"{out_dir.name}.adapter-{number}") for number in range(len(adapters))]
    try:
        for number, (source, copy) in enumerate(zip(adapters, copies, strict=True)):
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir(parents=True)
            refuse_unsafe_files(source)
            copy_allowed_files(source, copy)
            check_adapter(copy, base_names=base_names if number == 0 else None)
            add_tokenizer(copy, base_dir=copies[number - 1] if number else base_dir)
        report = merge_adapters(base_dir, adapter_dirs=copies, out_dir=out_dir)
        for facts, copy in zip(report.get("adapters", []), copies, strict=False):
            facts["sha256"] = digest_file(copy / WEIGHTS)
    finally:
        for copy in copies:
            shutil.rmtree(copy, ignore_errors=True)
    return inspect_model(out_dir) | report


def check_adapter(folder: Path, *, base_names: set[str] | None) -> None:
    """Refuse a copied adapter that is not plain LoRA, names a base not in `base_names`, or asks for code."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise Refused("no_adapter", f"The folder has no {name}.")
    config = read_json(folder / CONFIG)
    refuse_code(config, CONFIG)
    if config.get("peft_type") != "LORA" or config.get("task_type") not in (None, "CAUSAL_LM"):
        raise Refused("unsupported_adapter", "Only LoRA adapters of causal language models are supported.")
    for key in _UNSUPPORTED_SETTINGS:
        if config.get(key):
            raise Refused("unsupported_adapter", f"{CONFIG} sets {key}, which is not supported.")
    start = config.get("init_lora_weights")
    if isinstance(start, dict | list) or start not in _PLAIN_STARTS:
        raise Refused("unsupported_adapter", f"init_lora_weights {str(start)[:80]!r} is not supported.")
    named = config.get("base_model_name_or_path")
    known = base_names is None or (isinstance(named, str) and {named, last_part(named)} & base_names)
    if named and not known:
        raise Refused("wrong_base", f"The adapter says that it belongs to {str(named)[:200]!r}.")
    check_weights(folder, extra_modules=config.get("modules_to_save"))


def check_weights(folder: Path, *, extra_modules: Any) -> None:
    """Refuse tensors that are neither LoRA's nor of a module that the config says was trained whole."""
    modules = extra_modules or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise Refused("bad_adapter", "modules_to_save is not a list of names.")
    for name in read_safetensors_header(folder / WEIGHTS):
        if "lora_" not in name and not any(f".{module}." in name for module in modules):
            raise Refused("bad_adapter", f"The adapter has the tensor {name[:200]}, which is no part of it.")


def add_tokenizer(folder: Path, *, base_dir: Path) -> None:
    """The base's tokenizer where the adapter has none; one of its own is checked like a model's."""
    if not (folder / "tokenizer_config.json").exists():
        for path in sorted(base_dir.iterdir()):
            is_tokenizer = path.name in VOCABULARY_NAMES or path.suffix == ".model"
            if is_tokenizer or path.name in ("tokenizer_config.json", "chat_template.jinja"):
                shutil.copyfile(path, folder / path.name)
    for path in sorted(folder.glob("*.json")):
        refuse_code(read_json(path) if path.name not in VOCABULARY_NAMES else {}, path.name)
    check_tokenizer_config(folder)
    templates, special_tokens = read_templates(folder), read_special_tokens(folder)
    check_templates(templates, special_tokens=special_tokens)
    check_loaded_templates(load_tokenizer(folder), checked=(templates, special_tokens))


def last_part(name: str) -> str:
    """The last component of a path or a hub's name."""
    return name.rstrip("/").rpartition("/")[2]
