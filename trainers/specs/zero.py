"""What `deepspeed` may hold: our two configurations by name, or one of the user's own, of known keys only.

The job decides batch sizes, learning rate, optimizer, schedule and dtype; where a configuration names them it
must leave them to the job ("auto") or say the same. Nothing in it can name a file, a script or a service.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from trainers.specs.faults import SpecError
from trainers.specs.fields import Auto, Count, Number, Strict

PRESETS: dict[str, dict[str, Any]] = {
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
}
# The job's schedule that a DeepSpeed scheduler is.
SCHEDULES = {
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
    "WarmupLR": "constant_with_warmup",
}

_Elements = Annotated[Count, Field(ge=1, le=10_000_000_000)]


class _Offload(Strict):
    """To the memory of the host; never to a disk, whose path would be the user's choice."""

    device: Literal["cpu", "none"] = "none"
    pin_memory: bool = False


class _Zero(Strict):
    """`zero_optimization`: what is spread over the processes, and in pieces of how many elements."""

    stage: Literal[1, 2, 3]
    offload_optimizer: _Offload | None = None
    offload_param: _Offload | None = None
    contiguous_gradients: bool | None = None
    overlap_comm: bool | None = None
    reduce_scatter: bool | None = None
    reduce_bucket_size: Auto | _Elements | None = None
    allgather_partitions: bool | None = None
    allgather_bucket_size: _Elements | None = None
    round_robin_gradients: bool | None = None
    sub_group_size: _Elements | None = None
    stage3_prefetch_bucket_size: Auto | Annotated[Count, Field(ge=0, le=10_000_000_000)] | None = None
    stage3_param_persistence_threshold: Auto | Annotated[Count, Field(ge=0, le=10_000_000_000)] | None = None
    stage3_max_live_parameters: _Elements | None = None
    stage3_max_reuse_distance: _Elements | None = None
    stage3_gather_16bit_weights_on_model_save: Auto | Literal[True] | None = (
        None  # else nothing could be saved
    )

    @model_validator(mode="after")
    def _check(self) -> "_Zero":
        if self.stage < 3 and self.offload_param and self.offload_param.device != "none":
            raise ValueError("offload_param needs stage 3: before, every process holds all parameters")
        return self


class _Half(Strict):
    """`fp16` or `bf16`. Whether it is on is the job's dtype."""

    enabled: Auto | bool = "auto"
    loss_scale: Annotated[Number, Field(ge=0, le=2**32)] | None = None
    loss_scale_window: Annotated[Count, Field(ge=1, le=1_000_000)] | None = None
    initial_scale_power: Annotated[Count, Field(ge=0, le=32)] | None = None
    hysteresis: Annotated[Count, Field(ge=1, le=1000)] | None = None
    min_loss_scale: Annotated[Number, Field(ge=0, le=2**32)] | None = None


class _AdamWParams(Strict):
    lr: Auto = "auto"
    betas: Auto = "auto"
    eps: Auto = "auto"
    weight_decay: Auto = "auto"
    torch_adam: bool = True
    adam_w_mode: Literal[True] = True


class _AdamW(Strict):
    type: Literal["AdamW"]
    params: _AdamWParams = Field(default_factory=_AdamWParams)


class _WarmupParams(Strict):
    warmup_min_lr: Auto | Literal[0] = "auto"
    warmup_max_lr: Auto = "auto"
    warmup_num_steps: Auto = "auto"
    total_num_steps: Auto = "auto"
    warmup_type: Literal["linear"] = "linear"


class _Scheduler(Strict):
    type: Literal["WarmupDecayLR", "WarmupCosineLR", "WarmupLR"]
    params: _WarmupParams = Field(default_factory=_WarmupParams)


class _Config(Strict):
    zero_optimization: _Zero
    fp16: _Half | None = None
    bf16: _Half | None = None
    optimizer: _AdamW | None = None
    scheduler: _Scheduler | None = None
    train_batch_size: Auto = "auto"
    train_micro_batch_size_per_gpu: Auto = "auto"
    gradient_accumulation_steps: Auto = "auto"
    gradient_clipping: Auto = "auto"
    steps_per_print: Annotated[Count, Field(ge=1, le=1_000_000_000)] | None = None
    wall_clock_breakdown: Literal[False] = False
    zero_allow_untested_optimizer: Literal[True] = True
    zero_force_ds_cpu_optimizer: Literal[False] = False


def read_zero(value: Any) -> Any:
    """The value of `deepspeed`, numbers as DeepSpeed wants them. The `param` of a SpecError is inside it."""
    if value is None or (isinstance(value, str) and value in PRESETS):
        return value
    if isinstance(value, str):
        raise SpecError(
            f'must be "zero2", "zero3" or a DeepSpeed configuration as a JSON object; '
            f"files are not read: give the content of {value[:80]!r} instead"
        )
    if not isinstance(value, dict):
        raise SpecError('must be "zero2", "zero3" or a DeepSpeed configuration as a JSON object')
    try:
        return _Config.model_validate(value).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        raise _first_problem(error) from None


def _first_problem(error: ValidationError) -> SpecError:
    problems = error.errors(include_url=False)
    # Of "auto" or a number, the number is what was meant.
    problem = next((p for p in problems if p["type"] != "literal_error"), problems[0])
    # Between the keys, pydantic names the branches of a choice: "int", "literal['auto']", "constrained-int".
    *parents, last = problem["loc"]
    keys = [str(key) for key in parents if str(key) in _KEYS]
    if problem["type"] == "extra_forbidden" or str(last) in _KEYS:
        keys.append(str(last))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "this key is not allowed here"
    elif problem["type"] == "literal_error":
        message += "; the job decides the rest"
    return SpecError(message, param=".".join(keys) or None)


_KEYS = {
    key
    for model in (_Config, _Zero, _Offload, _Half, _AdamW, _AdamWParams, _Scheduler, _WarmupParams)
    for key in model.model_fields
}


def zero_stage(value: str | dict[str, Any] | None) -> int:
    """The ZeRO stage of a value of `deepspeed`; 0 without one."""
    if value is None:
        return 0
    config = PRESETS[value] if isinstance(value, str) else value
    return int(config["zero_optimization"]["stage"])


ZeroConfig = Annotated[Literal["zero2", "zero3"] | dict[str, Any] | None, BeforeValidator(read_zero)]
