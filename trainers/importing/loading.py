"""Load what is imported, with care: its templates, configuration, tokenizer and weights, or say why not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trainers.folders.artifacts import Refused, count_bytes, digest_folder
from trainers.importing.checks import (
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
from trainers.models.chat_template import find_end_of_turn_ids
from trainers.models.libraries import MODELS, preload

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
    preload(*MODELS)
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
