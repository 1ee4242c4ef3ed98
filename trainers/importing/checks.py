"""What may be near a model: checks of untrusted files as plain data, before anything loads them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainers.folders.artifacts import Refused
from trainers.models.chat_template import TemplateRefused, check_chat_template

HEADER_LIMIT_BYTES = 100_000_000  # the safetensors format's own limit
VOCABULARY_LIMIT_BYTES = 128 << 20
SETTINGS_LIMIT_BYTES = 16 << 20
TEMPLATES_FOLDER = "additional_chat_templates"
MAX_TEMPLATES = 16
VOCABULARY_NAMES = {
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
}
SETTINGS_NAMES = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "adapter_config.json",
    "chat_template.jinja",
}
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
_CODE_KEYS = {"auto_map", "custom_generate", "custom_pipelines", "use_kernels", "kernel_config"}
_KERNEL_KEY = re.compile(r"implementation|kernel")
_COUNT_KEY = re.compile(r"^(?!max_)(.*[_.])?(layers?|blocks?|block_count|experts|expert_count)$")
_MIN_EXPERTS_LIMIT = 1024  # the experts of a layer may lie in one tensor
# Only ever a note of where the tokenizer once came from.
_HARMLESS_PATHS = {"special_tokens_map_file"}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise Refused("not_a_model", f"{path.name} is not valid JSON.") from None
    if not isinstance(value, dict):
        raise Refused("not_a_model", f"{path.name} is not a JSON object.")
    return value


def refuse_code(value: Any, file_name: str) -> None:
    """Refuse, at any depth, keys that make transformers import a model's own code or fetch a kernel."""
    for key, child in walk_items(value):
        if key in _CODE_KEYS and child:
            raise Refused("remote_code", f"{file_name} names code to run ({key}).")
        if _KERNEL_KEY.search(key) and re.search(r"[/:]", _texts_of(child)):
            raise Refused("remote_code", f"{file_name} names a kernel to fetch ({key}).")


def walk_items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON value with what it holds, at any depth; without recursion, which has an end."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _texts_of(value: Any) -> str:
    """What a setting says, be it one text or one for each part of the model."""
    values = value.values() if isinstance(value, dict) else [value]
    return " ".join(item for item in values if isinstance(item, str))


def check_tokenizer_config(folder: Path) -> None:
    """Refuse arguments of the tokenizer's constructor that open files or stand where none are expected."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    config = read_json(path)
    if config.get("init_inputs"):
        raise Refused("unsafe_tokenizer", f"{path.name} gives the tokenizer's class arguments of its own.")
    for key, value in config.items():
        if key.endswith("_file") and isinstance(value, str) and key not in _HARMLESS_PATHS:
            name = Path(value).name
            if name != value or not (folder / name).is_file():
                raise Refused("unsafe_tokenizer", f"{path.name} names a file outside the model ({key}).")


def check_counts(config: dict[str, Any], *, n_tensors: int) -> None:
    """Refuse more layers than there are weights: a model is built layer by layer before it is compared."""
    for key, value in walk_items(config):
        if not isinstance(value, int) or not _COUNT_KEY.search(key):
            continue
        limit = max(n_tensors, _MIN_EXPERTS_LIMIT) if "expert" in key else n_tensors
        if value > limit:
            raise Refused("bad_config", f"{key} is {value}, but there are only {n_tensors} tensors.")


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; its declared size is checked before anything is read or parsed."""
    from safetensors import SafetensorError, safe_open

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
    header.pop("__metadata__", None)
    try:
        with safe_open(path, framework="numpy"):  # every tensor inside the file, none over another
            return header
    except (SafetensorError, OSError) as error:
        raise Refused("bad_safetensors", f"{path.name} is damaged: {error}") from error


def check_index(folder: Path, weight_files: set[str]) -> None:
    """The index may name only files of this folder."""
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        return
    weight_map = read_json(index_path).get("weight_map")
    named = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and name in weight_files for name in named):
        raise Refused("not_a_model", f"{index_path.name} names weights that are not in the folder.")


def read_templates(folder: Path) -> dict[str, Any]:
    """The chat templates of a copied folder by name, wherever transformers would find them."""
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    templates = name_templates(config.get("chat_template"))
    for path in [folder / "chat_template.jinja", *sorted((folder / TEMPLATES_FOLDER).glob("*"))]:
        if path.is_file():
            name = "default" if path.parent == folder else f"{TEMPLATES_FOLDER}/{path.stem}"
            # Beside, not over, the config's: which of the two is used is for transformers to say.
            templates[path.name if name in templates else name] = _read_text(path)
    return templates


def name_templates(value: Any) -> dict[str, Any]:
    """A tokenizer's `chat_template` as {name: template}: it may be one text, a mapping, or a list of both."""
    if not value:
        return {}
    if isinstance(value, list):
        if not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in value):
            raise Refused("bad_chat_template", "A chat template has no name.")
        return {item["name"]: item.get("template") for item in value}
    return value if isinstance(value, dict) else {"default": value}


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by attribute, such as {"bos_token": "<s>"}, as the tokenizer's files state them."""
    tokens = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        for key, value in read_json(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
    return tokens


def check_templates(templates: dict[str, Any], *, special_tokens: dict[str, str]) -> None:
    """Refuse the model when one of its chat templates misbehaves."""
    if len(templates) > MAX_TEMPLATES:
        raise Refused("bad_chat_template", f"The model has {len(templates)} chat templates.")
    for name, template in templates.items():
        if not isinstance(template, str):
            raise Refused("bad_chat_template", f"The chat template {name!r} is not a text.")
        try:
            check_chat_template(template, special_tokens=special_tokens)
        except TemplateRefused as refused:
            raise Refused("bad_chat_template", f"{refused} (template {name[:80]!r})") from refused


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise Refused("bad_chat_template", f"{path.name} is not UTF-8.") from None
