"""Warm start: a training begins with the weights of an adapter that was trained before.

Weights only: optimizer, schedule, step and place in the data are new. To go on with all of them is to resume,
which trainers.folders.checkpoints is for.
"""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainers.folders.checkpoints import find_damage
from trainers.specs import SpecError


def start_from_adapter(model: Any, folder: Path, *, manifest_sha256: str | None, method: str) -> None:
    """Overwrite the fresh adapter of `model`, with its head and whole modules, by the one in `folder`.

    The fresh one decides what is trained, so nothing is frozen that a new run would train. Raises SpecError
    unless both have the same scale and the same tensors, and for a checkpoint that is not as it was sealed.
    """
    param = f"method.{method}.hyperparameters.init_adapter"
    if problem := find_damage(folder, manifest_sha256=manifest_sha256):
        raise SpecError(f"init_adapter is damaged: {problem}", param=param)
    try:
        theirs, tensors = (
            PeftConfig.from_pretrained(str(folder)),
            load_file(folder / "adapter_model.safetensors"),
        )
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise SpecError(f"init_adapter cannot be read: {error}", param=param) from error
    ours = model.peft_config["default"]
    for name in ("r", "lora_alpha", "task_type"):  # the shapes of the tensors do not tell of a scale
        found, wanted = getattr(theirs, name, None), getattr(ours, name)
        if not isinstance(theirs, LoraConfig) or found != wanted:
            raise SpecError(f"init_adapter has {name} {found}, and the job has {wanted}", param=param)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if odd:
        raise SpecError(
            f"init_adapter does not fit the job's model: {len(odd)} tensors differ, such as {odd[0]}",
            param=param,
        )
    set_peft_model_state_dict(model, tensors)
