"""Supervised fine-tuning: a LoRA adapter, with TRL's trainer and our data, events and checkpoints."""

import re
import shutil
from math import ceil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.integration_utils import TensorBoardCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from trainers.artifacts import publish_folder, write_json
from trainers.checkpoints import Checkpoint
from trainers.data import IGNORED, load_tokenizer
from trainers.events import Events
from trainers.exits import Outcome
from trainers.loop import Attempt, Guarded
from trainers.prepare import ROWS_FILE
from trainers.ranks import StopRequest, barrier, rank, world_size
from trainers.specs import ResolvedSupervised, RunSpec, SpecError

_LAYER_INDEX = re.compile(r"\.\d+\.")


def train(
    run_dir: Path,
    *,
    spec: RunSpec,
    prepared: dict[str, Any],
    resume: Checkpoint | None,
    events: Events,
    stop: StopRequest,
    outcome: Outcome,
) -> None:
    """Trains an adapter into RUN_DIR/output, or until asked to stop; fills in the outcome as it goes."""
    events.phase("loading")
    settings = spec.supervised()
    train_rows = load_rows(prepared["train"])
    valid_rows = load_rows(prepared["validation"]) if prepared["validation"] else None
    dtype = choose_dtype(settings.dtype, events=events)
    model = AutoModelForCausalLM.from_pretrained(
        spec.model_dir, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    check_targets(model, settings.target_modules)
    arguments = configure(settings, run_dir=run_dir, seed=spec.seed, dtype=dtype, n_rows=len(train_rows))
    if valid_rows is not None:
        valid_rows = pad_rows(valid_rows, multiple=world_size() * settings.micro_batch_size)
        arguments.eval_strategy = "steps"
        arguments.eval_on_start = resume is None
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=valid_rows,
        processing_class=load_tokenizer(spec.model_dir),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType] - any number will do
            lora_dropout=settings.lora_dropout,
            target_modules=settings.target_modules,
        ),
        attempt=Attempt(run_dir, spec=spec, events=events, stop=stop, outcome=outcome),
        keep_checkpoints=settings.save_total_limit,
    )
    if rank() == 0:
        trainer.add_callback(Curves(SummaryWriter(str(run_dir / "tensorboard"))))
    describe(trainer, dtype=dtype, events=events)
    events.phase("training")
    summary = trainer.train_from(resume)
    if trainer.stopped_early:
        outcome.reason = "stopped"
        outcome.message = f"stopped after step {outcome.step} of {arguments.max_steps}"
        return
    events.phase("saving")
    save_output(run_dir, trainer=trainer, summary=summary, metrics=outcome.metrics)
    outcome.reason, outcome.message = "done", f"trained for {outcome.step} steps"


class SupervisedTrainer(Guarded, SFTTrainer):
    """Evaluates per token, so that the result depends on neither the batches nor the number of ranks."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._eval_losses: list[torch.Tensor] = []
        self._eval_tokens: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        counts: Any = self.accelerator.reduce(torch.stack(self._eval_tokens), "sum")
        loss: Any = self.accelerator.reduce(torch.stack(self._eval_losses).sum(), "sum")
        accuracies = torch.tensor(self._metrics["eval"]["mean_token_accuracy"], device=counts.device)
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = (loss / counts.sum()).item()
        self._metrics["eval"]["mean_token_accuracy"] = [((accuracies * counts).sum() / counts.sum()).item()]
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(model, inputs, *args, **kwargs)
        n_tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
        self._eval_tokens.append(n_tokens)
        self._eval_losses.append(result[0].detach().float() * n_tokens)
        return result


class Curves(TensorBoardCallback):
    """The curves alone: users may have the file, and the trainer's arguments are full of server paths."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        pass


def load_rows(folder: str) -> Dataset:
    return Dataset.from_file(str(Path(folder) / ROWS_FILE))


def pad_rows(rows: Dataset, *, multiple: int) -> Dataset:
    """The rows and as many rows without loss as make whole batches on every rank.

    Otherwise the last batch is filled up with rows from the start, which would count twice.
    """
    missing = -len(rows) % multiple
    if not missing:
        return rows
    token = rows[0]["input_ids"][:1]
    blank = {"input_ids": [token * 2] * missing, "labels": [[IGNORED] * 2] * missing}
    return concatenate_datasets([rows, Dataset.from_dict(blank, features=rows.features)])


def choose_dtype(wanted: str, *, events: Events) -> torch.dtype:
    """The type of the base model's weights and of its arithmetic; adapters stay in float32."""
    cuda = torch.cuda.is_available()
    if wanted == "auto":
        if cuda:
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32
    if wanted == "float16" and not cuda:
        events.message("float16 needs a GPU; training in bfloat16", level="warn", code="dtype_changed")
        return torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]


def check_targets(model: PreTrainedModel, names: str | list[str]) -> None:
    """Raises SpecError for a target module the model does not have."""
    if isinstance(names, str):
        return
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    last_parts = sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})
    for name in names:
        if name == "lm_head" or not any(full == name or full.endswith(f".{name}") for full in linear):
            raise SpecError(
                f"target_modules: {name!r} cannot be adapted in this model, "
                f"which has {', '.join(last_parts)}",
                param="method.supervised.hyperparameters.target_modules",
            )


def configure(
    settings: ResolvedSupervised, *, run_dir: Path, seed: int, dtype: torch.dtype, n_rows: int
) -> SFTConfig:
    """The trainer's arguments. Every one that the trainer would choose by itself is set."""
    cuda = torch.cuda.is_available()
    per_pass = settings.micro_batch_size * world_size()
    accumulation = settings.batch_size // per_pass
    total_steps = settings.max_steps or settings.n_epochs * ceil(ceil(n_rows / per_pass) / accumulation)
    checkpointing = cuda if settings.gradient_checkpointing == "auto" else settings.gradient_checkpointing
    return SFTConfig(
        output_dir=str(run_dir / "checkpoints"),
        seed=seed,
        data_seed=seed,
        per_device_train_batch_size=settings.micro_batch_size,
        per_device_eval_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=total_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=int(total_steps * settings.warmup_ratio),
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=checkpointing,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would report the average of the good steps instead
        eval_strategy="no",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps,
        use_cpu=not cuda,
        ddp_backend="gloo" if world_size() > 1 and not cuda else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
        report_to="none",
        disable_tqdm=True,
        push_to_hub=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are tokenized, labelled and cut
    )


def describe(trainer: SupervisedTrainer, *, dtype: torch.dtype, events: Events) -> None:
    """Tells what "auto" came to on this machine."""
    arguments, model = trainer.args, trainer.model
    assert model is not None
    adapted = {
        _LAYER_INDEX.sub(".*.", name.removeprefix("base_model.model."))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
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


def save_output(
    run_dir: Path, *, trainer: SupervisedTrainer, summary: dict[str, float], metrics: dict[str, Any]
) -> None:
    """Publishes RUN_DIR/output: the adapter with its tokenizer, and what the reference's users look for."""
    work, target = run_dir / "output.tmp", run_dir / "output"
    if rank() == 0:
        for leftover in (work, target):
            shutil.rmtree(leftover, ignore_errors=True)
    barrier()
    trainer.write_adapter(work)
    if rank() == 0:
        trainer.state.save_to_json(str(work / "trainer_state.json"))
        write_json(work / "train_results.json", summary)
        if "valid_loss" in metrics:
            write_json(work / "eval_results.json", {k: v for k, v in metrics.items() if "valid" in k})
        publish_folder(work, target)
    barrier()
