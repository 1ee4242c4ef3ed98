"""What a job asks for and what a run is given; the part of trainers that every process may import."""

import hashlib
import json
from difflib import get_close_matches
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

SPEC_VERSION = 1
BASE_LEARNING_RATE = 2e-4  # usual for LoRA, ten times that of full fine-tuning
METHODS = ("supervised",)

Auto = Literal["auto"]

# Names that users bring from MedicalGPT, TRL, transformers and LLaMA-Factory, and ours for the same thing.
ALIASES = {
    "num_train_epochs": "n_epochs",
    "num_epochs": "n_epochs",
    "epochs": "n_epochs",
    "global_batch_size": "batch_size",
    "effective_batch_size": "batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_batch_size": "micro_batch_size",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "model_max_length": "max_length",
    "cutoff_len": "max_length",
    "lora_r": "lora_rank",
    "r": "lora_rank",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "torch_dtype": "dtype",
    "lr_scheduler": "lr_scheduler_type",
    "max_train_steps": "max_steps",
    "max_gradient_norm": "max_grad_norm",
}
# Known names that have no equivalent here, with what to write instead.
REFUSED = {
    "gradient_accumulation_steps": "it follows from batch_size and micro_batch_size; set those",
    "fp16": 'set dtype to "float16"',
    "bf16": 'set dtype to "bfloat16"',
    "seed": "it is a field of the job, beside the model",
    "load_in_8bit": "quantized training is not available",
    "load_in_4bit": "quantized training is not available",
    "nproc_per_node": "it belongs to the job's resources",
}
DTYPES = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}


class SpecError(ValueError):
    """A wish that cannot be granted; `param` is its dotted path in the request."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Resources(Strict):
    nproc_per_node: int = Field(default=1, ge=1, le=64)
    nnodes: Literal[1] = 1


def _spell_dtype(value: Any) -> Any:
    return DTYPES.get(value, value) if isinstance(value, str) else value


def _split_modules(value: Any) -> Any:
    if not isinstance(value, str) or value == "all-linear":
        return value
    return "all-linear" if value == "all" else [name.strip() for name in value.split(",")]


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
ModuleName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.]+$")]
ModuleNames = Annotated[list[ModuleName], Field(min_length=1, max_length=64)]
TargetModules = Annotated[Literal["all-linear"] | ModuleNames, BeforeValidator(_split_modules)]
DType = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_spell_dtype)]


class Tuning(Strict):
    """What has a plain default. Lengths in tokens, intervals in optimizer steps."""

    max_steps: Annotated[Count, Field(ge=1, le=10_000_000)] | None = None
    max_length: Annotated[Count, Field(ge=16, le=131_072)] = 2048
    lora_rank: Annotated[Count, Field(ge=1, le=512)] = 8
    lora_alpha: Annotated[Number, Field(gt=0, le=2048)] = 16
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    target_modules: TargetModules = "all-linear"
    warmup_ratio: Annotated[Number, Field(ge=0, le=0.5)] = 0.03
    weight_decay: Annotated[Number, Field(ge=0, le=1)] = 0.0
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    max_grad_norm: Annotated[Number, Field(gt=0, le=1000)] = 1.0
    save_total_limit: Annotated[Count, Field(ge=1, le=100)] = 3
    # These two may stay "auto": the answer depends on the machine, so the run gives it and reports it.
    gradient_checkpointing: Auto | bool = "auto"
    dtype: DType = "auto"
    train_on_inputs: bool = False


class SupervisedHyperparameters(Tuning):
    """As a user writes them."""

    n_epochs: Auto | Annotated[Count, Field(ge=1, le=50)] = "auto"
    # Examples an optimizer step sees: micro_batch_size * gradient accumulation * number of processes.
    batch_size: Auto | Annotated[Count, Field(ge=1, le=256)] = "auto"
    micro_batch_size: Auto | Annotated[Count, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[Number, Field(gt=0, le=1000)] = "auto"
    learning_rate: Annotated[Number, Field(gt=0, le=1)] | None = None  # wins over the multiplier
    logging_steps: Auto | Annotated[Count, Field(ge=1, le=100_000)] = "auto"
    eval_steps: Auto | Annotated[Count, Field(ge=1, le=10_000_000)] = "auto"
    save_steps: Auto | Annotated[Count, Field(ge=1, le=10_000_000)] = "auto"


class ResolvedSupervised(Tuning):
    """As a run gets them."""

    n_epochs: Annotated[Count, Field(ge=1, le=50)]
    batch_size: Annotated[Count, Field(ge=1, le=256)]
    micro_batch_size: Annotated[Count, Field(ge=1, le=256)]
    learning_rate_multiplier: Annotated[Number, Field(gt=0)]
    learning_rate: Annotated[Number, Field(gt=0, le=1)]
    logging_steps: Annotated[Count, Field(ge=1)]
    eval_steps: Annotated[Count, Field(ge=1)]
    save_steps: Annotated[Count, Field(ge=1)]


class Supervised(Strict):
    hyperparameters: SupervisedHyperparameters = Field(default_factory=SupervisedHyperparameters)


class Method(Strict):
    type: Literal["supervised"] = "supervised"
    supervised: Supervised = Field(default_factory=Supervised)


def parse_method(method: dict | None, hyperparameters: dict | None) -> Method:
    """Reads a job's method; `hyperparameters` is the older top-level spelling of the supervised ones.

    Raises SpecError, whose param is the path of the offending field in the request.
    """
    kind, nested = _read_method(method)
    nested_path = f"method.{kind}.hyperparameters"
    if nested and hyperparameters:
        raise SpecError(
            f"hyperparameters are given twice: at the top level and in {nested_path}", param="hyperparameters"
        )
    given, path = (nested, nested_path) if nested else (hyperparameters or {}, "hyperparameters")
    if not isinstance(given, dict):
        raise SpecError("must be an object", param=path)
    try:
        parsed = SupervisedHyperparameters.model_validate(_rename(given, path=path))
    except ValidationError as error:
        raise _first_problem(error, path=path, given=given) from None
    return Method(supervised=Supervised(hyperparameters=parsed))


def _read_method(method: dict | None) -> tuple[str, Any]:
    """The method's type and the hyperparameters inside it, as they were written."""
    if method is None:
        return "supervised", {}
    if not isinstance(method, dict):
        raise SpecError("must be an object", param="method")
    kind = method.get("type")
    if kind is None:
        raise SpecError("method.type is missing", param="method.type", code="missing_required_parameter")
    if kind not in METHODS:
        raise SpecError(
            f"method type {kind!r} is not available here; available: {', '.join(METHODS)}",
            param="method.type",
            code="unsupported_value",
        )
    for key in method:
        if key not in ("type", kind):
            raise SpecError(
                f"unknown field {key!r} in a {kind} method", param=f"method.{key}", code="unknown_parameter"
            )
    body = method.get(kind) or {}
    if not isinstance(body, dict):
        raise SpecError("must be an object", param=f"method.{kind}")
    for key in body:
        if key != "hyperparameters":
            raise SpecError(
                f"unknown field {key!r}; hyperparameters go in method.{kind}.hyperparameters",
                param=f"method.{kind}.{key}",
                code="unknown_parameter",
            )
    return kind, body.get("hyperparameters") or {}


def _rename(given: dict, *, path: str) -> dict:
    """The same values under our names. Nulls mean "not given", as in OpenAI's clients."""
    known = SupervisedHyperparameters.model_fields
    renamed: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in REFUSED:
            raise SpecError(
                f"{name} is not a hyperparameter here: {REFUSED[name]}",
                param=f"{path}.{name}",
                code="unknown_parameter",
            )
        ours = ALIASES.get(name, name)
        if ours not in known:
            near = get_close_matches(name, [*known, *ALIASES], n=1)
            hint = f"; did you mean {ALIASES.get(near[0], near[0])!r}?" if near else ""
            raise SpecError(
                f"unknown hyperparameter {name!r}{hint}", param=f"{path}.{name}", code="unknown_parameter"
            )
        if ours in renamed:
            raise SpecError(f"{name} and {spelled[ours]} mean the same; give one", param=f"{path}.{name}")
        renamed[ours] = value
        spelled[ours] = name
    return renamed


def _first_problem(error: ValidationError, *, path: str, given: dict) -> SpecError:
    """The most telling of pydantic's complaints, addressed to the name the user wrote."""
    problems = error.errors(include_url=False)
    field = str(problems[0]["loc"][0]) if problems[0]["loc"] else ""
    # Of a union, every branch complains; "must be 'auto'" is the least useful of them.
    branches = [problem for problem in problems if problem["loc"][:1] == (field,)]
    telling = next((p for p in branches if p["type"] not in ("literal_error", "bool_type")), branches[0])
    if telling["type"] in ("int_parsing", "float_parsing") and len(branches) > 1:
        message = 'must be "auto" or a number'
    else:
        message = telling["msg"].removeprefix("Value error, ")
    written = next((name for name in given if ALIASES.get(name, name) == field), field)
    return SpecError(f"{written}: {message} (got {given.get(written)!r})", param=f"{path}.{written}")


def resolve(method: Method, *, n_examples: int, seed: int, nproc_per_node: int = 1) -> dict:
    """The hyperparameters with every "auto" that does not depend on the machine replaced by a number.

    The same input always gives the same answer. Raises SpecError where the numbers cannot be combined.
    """
    if not 0 <= seed < 2**32:
        raise SpecError("seed must be between 0 and 4294967295", param="seed")
    if n_examples < 1:
        raise SpecError("the training file has no examples", param="training_file")
    asked = method.supervised.hyperparameters
    n_epochs = _choose_epochs(n_examples) if asked.n_epochs == "auto" else asked.n_epochs
    batch_size = asked.batch_size
    if batch_size == "auto":
        batch_size = _choose_batch(n_examples, nproc_per_node, micro=asked.micro_batch_size)
    micro = asked.micro_batch_size
    if micro == "auto":
        micro = _choose_micro_batch(batch_size // nproc_per_node, asked.max_length)
    _check_batch(batch_size, micro=micro, nproc_per_node=nproc_per_node)
    multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
    learning_rate = asked.learning_rate or BASE_LEARNING_RATE * multiplier
    total_steps = asked.max_steps or n_epochs * ceil(n_examples / batch_size)
    interval = min(max(ceil(total_steps / 10), 10), 500)
    log_interval = 1 if total_steps <= 1000 else 10
    resolved = asked.model_dump() | {
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "micro_batch_size": micro,
        "learning_rate": learning_rate,
        "learning_rate_multiplier": learning_rate / BASE_LEARNING_RATE,
        "logging_steps": log_interval if asked.logging_steps == "auto" else asked.logging_steps,
        # Evaluating where we save gives every checkpoint its validation loss.
        "eval_steps": interval if asked.eval_steps == "auto" else asked.eval_steps,
        "save_steps": interval if asked.save_steps == "auto" else asked.save_steps,
    }
    return ResolvedSupervised.model_validate(resolved).model_dump()


def _choose_epochs(n_examples: int) -> int:
    """Three, more for very small files (at least 100 examples seen), fewer for very large ones."""
    if n_examples * 3 < 100:
        return min(25, ceil(100 / n_examples))
    if n_examples * 3 > 25_000:
        return max(1, 25_000 // n_examples)
    return 3


def _choose_batch(n_examples: int, nproc_per_node: int, *, micro: int | Literal["auto"]) -> int:
    """About 0.2 % of the examples, between 4 and 64, a multiple of what one pass over all processes takes."""
    unit = nproc_per_node * (1 if micro == "auto" else micro)
    size = 4
    while size < 64 and size < n_examples * 0.002:
        size *= 2
    return ceil(size / unit) * unit


def _choose_micro_batch(per_process: int, max_length: int) -> int:
    """The largest divisor that keeps a forward pass under about 8,192 tokens; the rest is accumulated."""
    limit = min(8, max(1, 8192 // max_length))
    return max((size for size in range(1, limit + 1) if per_process % size == 0), default=1)


def _check_batch(batch_size: int, *, micro: int, nproc_per_node: int) -> None:
    path = "method.supervised.hyperparameters"
    if batch_size > 256:
        raise SpecError(
            f"micro_batch_size {micro} on {nproc_per_node} processes makes a batch of more than 256",
            param=f"{path}.micro_batch_size",
        )
    if batch_size % (micro * nproc_per_node):
        raise SpecError(
            f"batch_size {batch_size} is not a multiple of "
            f"micro_batch_size {micro} times {nproc_per_node} processes",
            param=f"{path}.batch_size",
        )


class RunSpec(Strict):
    """RUN_DIR/spec.json: one attempt at one job. Paths are absolute."""

    spec_version: Literal[1] = SPEC_VERSION
    job_id: str = Field(min_length=1, max_length=200)
    attempt: int = Field(ge=1)
    method: str
    hyperparameters: dict
    seed: int = Field(ge=0, lt=2**32)
    resources: Resources = Field(default_factory=Resources)
    model_dir: Path
    model_id: str
    model_digest: str = ""
    train_file: Path
    validation_file: Path | None = None
    cache_dir: Path
    resume_roots: list[Path] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> "RunSpec":
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is not available; available: {', '.join(METHODS)}")
        paths = [self.model_dir, self.train_file, self.cache_dir, self.validation_file, *self.resume_roots]
        for path in paths:
            if path is not None and not path.is_absolute():
                raise ValueError(f"{path} is not an absolute path")
        self.supervised()
        return self

    def supervised(self) -> ResolvedSupervised:
        resolved = ResolvedSupervised.model_validate(self.hyperparameters)
        _check_batch(
            resolved.batch_size, micro=resolved.micro_batch_size, nproc_per_node=self.resources.nproc_per_node
        )
        return resolved

    def settings_sha256(self) -> str:
        """What must be equal for a checkpoint of one attempt to be resumed by another."""
        settings = [self.method, self.hyperparameters, self.seed, self.model_digest]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def load_run_spec(run_dir: str | Path) -> RunSpec:
    """Reads RUN_DIR/spec.json. Raises SpecError when it is missing or not a run."""
    path = Path(run_dir) / "spec.json"
    try:
        return RunSpec.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise SpecError(f"{path} does not exist") from None
    except ValueError as error:  # broken JSON and pydantic's ValidationError alike
        raise SpecError(f"{path} is not a run: {error}") from None
