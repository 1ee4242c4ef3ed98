"""DeepSpeed's ZeRO in the trainer's loop: optimizer state, gradients and, in stage 3, weights in shards."""

import importlib.util
from typing import Any

import torch

from trainers.specs import SpecError
from trainers.specs.parameters import Resolved
from trainers.specs.zero import PRESETS, zero_stage

# DeepSpeed leaves one in every checkpoint; nobody is to run a script from there.
RECOVERY_SCRIPTS = "zero_to_*.py"


def start_zero(settings: Resolved) -> dict[str, Any] | None:
    """Joins DeepSpeed to the ranks and returns its configuration; None for a job without it.

    What the job decides is left to the trainer's arguments ("auto"). Call it before the model is loaded:
    stage 3 spreads that over the ranks as it comes from the disk. Raises SpecError without DeepSpeed.
    """
    wanted = settings.deepspeed
    if wanted is None:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise SpecError("deepspeed is not installed on this machine", param="deepspeed")
    import deepspeed

    # It would look for a compiler and spend a minute on building a faster all-reduce between CPUs.
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return _complete(PRESETS[wanted] if isinstance(wanted, str) else wanted)


def _complete(wanted: dict[str, Any]) -> dict[str, Any]:
    zero = dict(wanted["zero_optimization"])
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    # An optimizer or a scheduler that a configuration may name is the job's own, and the trainer makes that.
    kept = {name: value for name, value in wanted.items() if name not in ("optimizer", "scheduler")}
    return kept | {
        "zero_optimization": zero,
        "fp16": wanted.get("fp16", {}) | {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own is compiled on the spot, if the machine can
    }


def shards_weights(settings: Resolved) -> bool:
    """Whether each process holds only its part of the weights."""
    return zero_stage(settings.deepspeed) == 3


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter: its shard in stage 3, else all of it."""
    return getattr(parameter, "ds_tensor", parameter)


def count_elements(parameter: torch.Tensor) -> int:
    """Elements of a whole parameter, however much of it is here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
