"""What every method does alike: before its first step, and after its last."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import TensorBoardCallback

from trainers.folders.artifacts import publish_folder, write_json
from trainers.folders.checkpoints import Checkpoint
from trainers.folders.events import Events
from trainers.models.quantized import configure_quantization, keep_differentiable
from trainers.models.warm_start import start_from_adapter
from trainers.specs import METHODS, SpecError
from trainers.specs.combinations import WITHOUT_FLOAT16
from trainers.specs.parameters import Resolved
from trainers.specs.resolution import count_answers
from trainers.tokens.conversations import load_tokenizer
from trainers.tokens.prepared import ROWS_FILE
from trainers.training.attempt import Attempt
from trainers.training.loop import Guarded
from trainers.training.ranks import barrier, rank, world_size
from trainers.training.zero import count_elements, shards_weights, start_zero

TOKEN_MODULES = {"embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out"}
_LAYER_INDEX = re.compile(r"\.\d+\.")


def load_base(auto_class: Any, attempt: Attempt, *, dtype: torch.dtype, **more: Any) -> PreTrainedModel:
    """The job's model, offline and without remote code, in fewer bits where the job says so.

    Call it once the trainer's arguments are made. Raises SpecError for targets that the model does not have.
    """
    spec = attempt.spec
    settings = spec.settings()
    # The arguments tell transformers to load it in shards.
    assert is_deepspeed_zero3_enabled() == shards_weights(settings)
    model = auto_class.from_pretrained(
        spec.model_dir,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        **configure_quantization(settings, dtype=dtype),
        **more,
    )
    keep_differentiable(model)
    if settings.use_peft:
        check_targets(model, settings.target_modules, method=spec.method)
    check_modules(model, settings.modules_to_save or [], method=spec.method)
    return model


def ensure_pad_token(tokenizer: Any) -> int:
    """The id of the padding token; the end-of-text token where the tokenizer has none."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    pad_token_id: Any = tokenizer.pad_token_id
    return int(pad_token_id)


def configure_lora(
    settings: Resolved,
    *,
    task_type: str,
    model: PreTrainedModel | None = None,
    token_modules: Sequence[str] = (),
) -> LoraConfig | None:
    """The adapter as the job wants it; None for a job that trains all weights.

    model: which gets it, needed only where modules are trained whole. token_modules: what holds rows of new
    tokens, and must be trained whole with them.
    """
    if not settings.use_peft:
        return None
    whole: list[str] = sorted({*(settings.modules_to_save or []), *token_modules})
    tied = bool(model and getattr(model.config, "tie_word_embeddings", False))
    return LoraConfig(
        modules_to_save=whole or None,
        ensure_weight_tying=tied and any(name in TOKEN_MODULES for name in whole),
        task_type=task_type,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType] - any number will do
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
    )


@dataclass(frozen=True)
class Materials:
    """What a run trains with."""

    train_rows: Dataset
    valid_rows: Dataset | None
    tokenizer: Any
    dtype: torch.dtype


def gather_materials(attempt: Attempt, prepared: dict[str, Any]) -> Materials:
    """Rows and tokenizer as they were prepared, and the type of the weights."""
    attempt.events.phase("loading")
    for_chat = METHODS[attempt.spec.method].learns_from != "document"
    return Materials(
        load_rows(prepared["train"]),
        load_rows(prepared["validation"]) if prepared["validation"] else None,
        load_tokenizer(Path(prepared["tokenizer"]), for_chat=for_chat),
        choose_dtype(attempt),
    )


def common_arguments(attempt: Attempt, materials: Materials, *, resume: Checkpoint | None) -> dict[str, Any]:
    """Arguments of every trainer. Each one that the trainer would choose by itself is set."""
    settings, seed, dtype = attempt.spec.settings(), attempt.spec.seed, materials.dtype
    evaluates = materials.valid_rows is not None
    cuda = torch.cuda.is_available()
    per_pass = settings.micro_batch_size * world_size()
    accumulation = settings.batch_size // per_pass
    n_passes = ceil(len(materials.train_rows) * count_answers(settings) / per_pass)
    total_steps = settings.max_steps or settings.n_epochs * ceil(n_passes / accumulation)
    zero = start_zero(settings)
    checkpointing = cuda if settings.gradient_checkpointing == "auto" else settings.gradient_checkpointing
    return {
        "output_dir": str(attempt.run_dir / "checkpoints"),
        "seed": seed,
        "data_seed": seed,
        "per_device_train_batch_size": settings.micro_batch_size,
        "per_device_eval_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": total_steps,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": int(total_steps * settings.warmup_ratio),
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": checkpointing,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would report the average of the good steps instead
        "eval_strategy": "steps" if evaluates else "no",
        "eval_on_start": evaluates and resume is None,
        "eval_steps": settings.eval_steps,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "deepspeed": zero,
        "use_cpu": not cuda,
        "ddp_backend": "gloo" if world_size() > 1 and not cuda else None,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": cuda,
        "report_to": "none",
        "disable_tqdm": True,
        "push_to_hub": False,
    }


def carry_out(trainer: Guarded, *, resume: Checkpoint | None, dtype: torch.dtype) -> None:
    """Trains into RUN_DIR/output, or until asked to stop; the outcome says which."""
    attempt = trainer.attempt
    outcome, events = attempt.outcome, attempt.events
    if attempt.spec.init_adapter_dir and resume is None:
        start_from_adapter(
            trainer.model,
            attempt.spec.init_adapter_dir,
            manifest_sha256=attempt.spec.init_manifest_sha256,
            method=attempt.spec.method,
        )
        named = attempt.spec.settings().init_adapter
        events.message(f"Starting from the weights of {named}", code="warm_start")
    if rank() == 0:
        trainer.add_callback(Curves(SummaryWriter(str(attempt.run_dir / "tensorboard"))))
    describe(trainer, dtype=dtype, events=events)
    events.phase("training")
    summary = trainer.train_from(resume)
    if torch.cuda.is_available():
        peak_bytes = torch.cuda.max_memory_allocated()
        events.message(
            f"{peak_bytes / 2**30:.1f} GiB of GPU memory at most",
            code="peak_memory",
            peak_gpu_bytes=peak_bytes,
        )
    if trainer.stopped_early:
        outcome.reason = "stopped"
        outcome.message = f"stopped after step {outcome.step} of {trainer.args.max_steps}"
        return
    events.phase("saving")
    save_output(attempt, trainer=trainer, summary=summary)
    outcome.reason, outcome.message = "done", f"trained for {outcome.step} steps"


class Curves(TensorBoardCallback):
    """The curves alone: users may have the file, and the trainer's arguments are full of server paths."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        pass


def load_rows(folder: str) -> Dataset:
    """Prepared rows."""
    return Dataset.from_file(str(Path(folder) / ROWS_FILE))


def choose_dtype(attempt: Attempt) -> torch.dtype:
    """The type of the base model's weights and of its arithmetic; adapters stay in float32."""
    wanted, cuda = attempt.spec.settings().dtype, torch.cuda.is_available()
    if wanted == "auto":
        if not cuda:
            return torch.float32
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16
        return torch.float32 if attempt.spec.method in WITHOUT_FLOAT16 else torch.float16
    if wanted == "float16" and not cuda:
        attempt.events.message(
            "float16 needs a GPU; training in bfloat16", level="warn", code="dtype_changed"
        )
        return torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]


def check_targets(model: PreTrainedModel, names: str | list[str], *, method: str) -> None:
    """Raises SpecError for a target module the model does not have."""
    if isinstance(names, str):
        return
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    heads = {"lm_head", "score"}
    last_parts = sorted({name.rpartition(".")[2] for name in linear} - heads)
    for name in names:
        if name in ("lm_head", "score") or not any(
            full == name or full.endswith(f".{name}") for full in linear
        ):
            raise SpecError(
                f"target_modules: {name!r} cannot be adapted in this model, "
                f"which has {', '.join(last_parts)}",
                param=f"method.{method}.hyperparameters.target_modules",
            )


def check_modules(model: PreTrainedModel, names: list[str], *, method: str) -> None:
    """Raises SpecError for a module to be trained whole that the model does not have."""
    known = {name for name, _ in model.named_modules() if name}
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full in known):
            raise SpecError(
                f"modules_to_save: this model has no module {name!r}",
                param=f"method.{method}.hyperparameters.modules_to_save",
            )


def describe(trainer: Guarded, *, dtype: torch.dtype, events: Events) -> None:
    """Tells what "auto" came to on this machine."""
    arguments, model = trainer.args, trainer.model
    assert model is not None
    adapted = {
        _LAYER_INDEX.sub(".*.", name.removeprefix("base_model.model."))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    trainable = sum(count_elements(p) for p in model.parameters() if p.requires_grad)
    events.message(
        f"{trainable:,} trainable parameters, {arguments.max_steps} steps "
        f"of {arguments.per_device_train_batch_size} rows x {arguments.gradient_accumulation_steps} passes "
        f"x {world_size()} processes, "
        f"{str(dtype).removeprefix('torch.')} on {arguments.device.type}",
        code="configured",
        trainable_parameters=trainable,
        target_modules=sorted(adapted),
        total_steps=arguments.max_steps,
        micro_batch_size=arguments.per_device_train_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        gradient_checkpointing=arguments.gradient_checkpointing,
        dtype=str(dtype).removeprefix("torch."),
        device=arguments.device.type,
    )


class Trained(Protocol):
    """What has been trained, and how it went."""

    state: TrainerState

    def write_adapter(self, folder: Path) -> None:
        """Adapter and tokenizer. Every rank calls it."""
        ...


def save_output(attempt: Attempt, *, trainer: "Trained", summary: dict[str, float]) -> None:
    """Publishes RUN_DIR/output: the adapter with its tokenizer, and what the reference's users look for."""
    run_dir, metrics = attempt.run_dir, attempt.outcome.metrics
    work, target = run_dir / "output.tmp", run_dir / "output"
    if rank() == 0:
        for leftover in (work, target):
            shutil.rmtree(leftover, ignore_errors=True)
    barrier()
    trainer.write_adapter(work)
    if rank() == 0:
        trainer.state.save_to_json(str(work / "trainer_state.json"))
        write_json(work / "train_results.json", summary)
        if any(name.startswith("valid_") for name in metrics):
            write_json(work / "eval_results.json", {k: v for k, v in metrics.items() if "valid" in k})
        attempt.evaluation.write(work)
        publish_folder(work, target)
    barrier()
