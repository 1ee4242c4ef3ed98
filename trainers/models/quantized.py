"""A frozen base in 8 or 4 bits under a LoRA adapter (Dettmers et al. 2022, 2023)."""

import importlib.util
from typing import Any

import torch

from trainers.specs import SpecError
from trainers.specs.parameters import Resolved

# They stay in the base's dtype: what the hidden state becomes at the end, a token or a score.
HEADS = ["lm_head", "embed_out", "score"]


def is_quantized(settings: Resolved) -> bool:
    """Whether the base is held in 8 or 4 bits."""
    return settings.load_in_8bit or settings.load_in_4bit


def configure_quantization(settings: Resolved, *, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained: int8, or nf4 with its constants quantized again; products in `dtype`.

    Raises SpecError where bitsandbytes is not installed.
    """
    if not is_quantized(settings):
        return {}
    flag = "load_in_4bit" if settings.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SpecError(f"{flag} needs bitsandbytes, which is not installed on this machine", param=flag)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=settings.load_in_8bit,
        load_in_4bit=settings.load_in_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=HEADS,
    )
    return {"quantization_config": config}


def describe_quantization(settings: Resolved) -> list[dict[str, str]]:
    """A warning where the adapter learned on rounded weights, and is now on those that were not."""
    if not is_quantized(settings):
        return []
    bits = 4 if settings.load_in_4bit else 8
    message = (
        f"The adapter was trained on the base in {bits} bits and merged into the base as it is stored: "
        "answers may differ a little from what training saw."
    )
    return [{"code": "trained_on_quantized_base", "message": message}]


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keeps 4-bit layers from packing their weights for this CPU's fast inference in the first evaluation.

    Packed weights have no backward pass: from then on the adapters below would get no gradients, and no error
    would say so.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
