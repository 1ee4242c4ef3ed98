"""Load a base model and put a PEFT adapter on it, refusing pairs that do not fit."""

from pathlib import Path
from typing import Any, Literal

from trainers.folders.artifacts import Refused
from trainers.models.vocabulary import add_rows, count_rows

Head = Literal["lm", "score"]  # what a model ends in: tokens to come, or one number for a whole text
# In the config of every reward model of ours: its head was trained, not made up when it was loaded.
TRAINED_HEAD_KEY = "residency_reward_head"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of `folder`, offline and without remote code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_model(folder: Path, *, dtype: Any = "auto", head: Head = "lm") -> Any:
    """A model in evaluation mode, offline, without remote code. dtype "auto": the stored one.

    With the head "score" it gives one number a text; on a language model's folder that head is random. The
    attention is named so that a config cannot ask for a kernel from a hub.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto_class: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    model = auto_class.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        **({} if head == "lm" else {"num_labels": 1}),
    )
    return model.eval()


def attach_adapter(model: Any, *, adapter_dir: Path, tokenizer: Any) -> Any:
    """`model` wrapped with the adapter. Raises Refused unless every tensor of the adapter found its place."""
    from peft import PeftConfig, PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    weights = adapter_dir / "adapter_model.safetensors"
    if not (adapter_dir / "adapter_config.json").is_file() or not weights.is_file():
        raise Refused("no_adapter", f"{adapter_dir} holds no adapter in safetensors format.")
    try:
        with safe_open(weights, framework="pt") as file:
            stored = set(file.keys())
        config = PeftConfig.from_pretrained(str(adapter_dir))
        if count_rows(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            if not _brings_embedding(model, config):
                raise Refused("bad_adapter", "The adapter's tokenizer has more tokens than the base model.")
            add_rows(model, tokenizer)
        adapted = PeftModel.from_pretrained(model, adapter_dir, config=config, is_trainable=False)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise Refused("bad_adapter", f"The adapter does not fit the base model: {error}") from error
    # PEFT only warns about tensors that are missing or left over.
    loaded = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if stored != loaded:
        odd = sorted(stored ^ loaded)
        raise Refused(
            "bad_adapter", f"{len(odd)} adapter tensors do not fit the base model, such as {odd[0]}."
        )
    return adapted.eval()


def _brings_embedding(model: Any, config: Any) -> bool:
    embedding = model.get_input_embeddings()
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module is embedding}
    return bool(names & {name.rpartition(".")[2] for name in getattr(config, "modules_to_save", None) or ()})


def find_stop_ids(tokenizer: Any, generation_eos: Any) -> list[int]:
    """Ids that end a generation: the model's own, the tokenizer's eos and the chat template's end of turn."""
    from trainers.models.chat_template import find_end_of_turn_ids

    listed = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    ids = dict.fromkeys([*listed, tokenizer.eos_token_id, *find_end_of_turn_ids(tokenizer)])
    return [token_id for token_id in ids if token_id is not None and token_id >= 0]
