"""What every method adds to a trainer's loop: events, our checkpoints, stopping together, no NaN."""

import json
import time
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback

from trainers.folders.artifacts import write_json
from trainers.folders.checkpoints import Checkpoint, stage
from trainers.folders.exits import NanLoss
from trainers.training.answers import answer_prompts
from trainers.training.attempt import Attempt
from trainers.training.ranks import any_rank, barrier, rank
from trainers.training.zero import RECOVERY_SCRIPTS, own_part

_STATE_FILE = "trainer_state.json"
_PROGRESS_FILE = "progress.json"
_NOT_KEPT = (
    "training_args.bin",  # a pickle; every run is configured from its spec
    "README.md",  # a model card about the base model's path
)


class _EvaluationCut(Exception):
    """Asked to stop in the middle of an evaluation."""


class Guarded(Trainer):
    """Goes in front of a trainer class; its private methods overridden here are those of transformers 5."""

    # Numbers in the trainer's logs, and what they are called in events, after `train_` or `valid_`.
    reported: ClassVar[dict[str, str]] = {"mean_token_accuracy": "mean_token_accuracy"}
    # The same of an evaluation; None: the loss, and what is reported of training.
    evaluated: ClassVar[dict[str, str] | None] = None
    evaluates_loss: ClassVar[bool] = True  # whether the loss of held-out rows says something

    def __init__(self, *args: Any, attempt: Attempt, keep_checkpoints: int, **kwargs: Any):
        self.attempt = attempt
        self.stopped_early = False
        self._keep_checkpoints = keep_checkpoints
        self._evaluated_step: int | None = None
        self._all_finite = torch.tensor(True)
        super().__init__(*args, **kwargs)
        widen_trained(self.model)
        self.remove_callback(PrinterCallback)  # it prints every log to stdout
        self.add_callback(_Pace(self))
        self.add_callback(_Report(attempt, self.reported, self.evaluated))

    # Starting

    def train_from(self, resume: Checkpoint | None) -> dict[str, float]:
        """Trains to the end or to a stop; returns the trainer's summary."""
        if resume is None:
            return self.train().metrics
        self._recall(resume)
        if resume.step < self.args.max_steps:
            return self.train(resume_from_checkpoint=str(resume.path)).metrics
        # Killed between its last step and its end. The loop would take one step more.
        if self.is_deepspeed_enabled:  # whose engine reads its own files
            self._prepare_for_training(self.args.max_steps, self.get_train_dataloader(), str(resume.path))
        else:
            self._load_from_checkpoint(str(resume.path))
        self.state = TrainerState.load_from_json(str(resume.path / _STATE_FILE))
        if self.eval_dataset is not None and self._evaluated_step != resume.step:
            self.evaluate()
        self.answer()
        return {}

    def _recall(self, resume: Checkpoint) -> None:
        progress = json.loads((resume.path / _PROGRESS_FILE).read_bytes())
        outcome = self.attempt.outcome
        outcome.step = resume.step
        outcome.trained_tokens = self._total_train_tokens = progress["trained_tokens"]
        outcome.metrics.update(progress["metrics"])
        self._evaluated_step = progress["evaluated_step"]
        self.attempt.evaluation.recall(resume.path)

    # Each step

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._all_finite = torch.isfinite(loss) & self._all_finite.to(loss.device)
        if self.accelerator.sync_gradients:  # the optimizer moves next: the ranks agree before it does
            broken = not bool(self._all_finite)
            self._all_finite = torch.tensor(True)
            stop, broken = any_rank(self.attempt.stop.requested, broken)
            if broken:
                raise NanLoss(
                    f"the loss is not a finite number at step {self.state.global_step + 1}: "
                    "lower the learning rate, or look for broken rows"
                )
            self.stopped_early |= stop and self.state.global_step + 1 < self.state.max_steps
        return loss

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.attempt.events.phase("evaluating")
        try:
            # Its data loader draws from the state that dropout uses: evaluating, or a stop that leaves
            # an evaluation out, would change the training that follows.
            device = self.args.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                metrics = super().evaluate(*args, **kwargs)
        except _EvaluationCut:
            self.stopped_early = True
            self.control.should_evaluate = False
            self.control.should_save = True
            self.control.should_training_stop = True
            return {}
        finally:
            self.attempt.events.phase("training")
        self._evaluated_step = self.state.global_step
        return metrics

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self.check_stop()
        return super().prediction_step(*args, **kwargs)

    def check_stop(self) -> None:
        """Leave an evaluation when a rank was asked to stop. Every rank calls it."""
        if any_rank(self.attempt.stop.requested)[0]:
            raise _EvaluationCut

    def answer(self) -> None:
        """Lets the model answer the fixed prompts as it is. Every rank calls it."""
        with self.accelerator.autocast():  # the trainer casts in a forward that generating passes by
            answered = answer_prompts(
                self.model,
                self.attempt,
                tokenizer=self.processing_class,
                step=self.state.global_step,
                sharded=is_deepspeed_zero3_enabled(),
            )
        self.attempt.events.phase("training")
        if not answered and self.state.global_step < self.state.max_steps:
            self.stopped_early = self.control.should_training_stop = True

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002 - the trainer's signature
        """In place of the trainer's own, which writes where readers look and rotates by its own rules."""
        step = self.state.global_step
        root = self.attempt.run_dir / "checkpoints"
        self._check_weights()
        self.answer()
        self.attempt.events.phase("saving")
        self.store_flos()
        staged = root / f"step-{step}.tmp"
        if rank() == 0:
            stage(root, step=step)
        barrier()
        self.write_adapter(staged)
        self._save_optimizer_and_scheduler(str(staged))
        self._save_scaler(str(staged))
        self._save_rng_state(str(staged))
        barrier()
        if rank() == 0:
            self._seal(staged, step=step)
        barrier()
        self.attempt.events.phase("training")

    def _seal(self, staged: Path, *, step: int) -> None:
        outcome = self.attempt.outcome
        for script in staged.glob(RECOVERY_SCRIPTS):
            script.unlink()
        self.state.save_to_json(str(staged / _STATE_FILE))
        progress = {
            "trained_tokens": outcome.trained_tokens,
            "metrics": outcome.metrics,
            "evaluated_step": self._evaluated_step,
        }
        write_json(staged / _PROGRESS_FILE, progress)
        told = ["train_loss", *(f"train_{name}" for name in self.reported.values())]
        if self._evaluated_step == step:
            for name in ("loss", *self.reported.values()):
                told += [f"valid_{name}", f"full_valid_{name}"]
        self.attempt.seal_checkpoint(staged, step=step, keep=self._keep_checkpoints, figures=told)

    def _check_weights(self) -> None:
        """A finite loss can still have had infinite gradients; such weights must not become a checkpoint."""
        assert self.model is not None
        broken = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and not torch.isfinite(own_part(parameter)).all()
        ]
        if any_rank(bool(broken))[0]:
            where = broken[0] if broken else "another rank"
            raise NanLoss(f"the weights of {where} are not finite at step {self.state.global_step}")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            return super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            # Left to itself PEFT adds the embeddings where they have grown, beside their trained copy.
            model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
            cast(Any, self.processing_class).save_pretrained(output_dir)

    def write_adapter(self, folder: Path) -> None:
        """Adapter and tokenizer, without what others could not or should not read. Every rank calls it."""
        if self.is_deepspeed_enabled and not is_deepspeed_zero3_enabled():
            self._save(str(folder))  # every rank has all weights; save_model would copy the base's as well
        else:
            self.save_model(str(folder), _internal_call=True)
        if rank() == 0:
            for name in _NOT_KEPT:
                (folder / name).unlink(missing_ok=True)
            config_file = folder / "adapter_config.json"
            if config_file.exists():
                config = json.loads(config_file.read_bytes())
                # The path on this machine says nothing elsewhere.
                config["base_model_name_or_path"] = self.attempt.spec.model_id
                write_json(config_file, config)


def widen_trained(model: Any) -> None:
    """What is trained is float32, whatever computes with it: else small updates are lost, and float16 fails.

    ZeRO-3 is left alone: its shards have one dtype, and its optimizer keeps the float32 copy.
    """
    if is_deepspeed_zero3_enabled():
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class _Pace(TrainerCallback):
    """Decides what else happens, before the first step and at the end of each."""

    def __init__(self, trainer: Guarded):
        self._trainer = trainer

    def on_train_begin(self, _args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step == 0:
            self._trainer.answer()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trainer.stopped_early:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        elif state.global_step >= state.max_steps:
            control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"
        # The loss is averaged since the last log. Logging at each save makes a resumed run average alike.
        control.should_log |= control.should_save


class _Report(TrainerCallback):
    """Turns the trainer's logs into events and keeps the outcome up to date."""

    def __init__(self, attempt: Attempt, reported: dict[str, str], evaluated: dict[str, str] | None):
        self._attempt, self._reported = attempt, reported
        self._evaluated = evaluated or {"loss": "loss", **reported}
        self._began = 0.0
        self._spent_s = 0.0
        self._steps = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, _args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self._spent_s += time.perf_counter() - self._began
        self._steps += 1
        self._attempt.outcome.step = state.global_step

    def on_log(self, _args: Any, state: TrainerState, *_: Any, logs: dict[str, float], **__: Any) -> None:
        data = self._read_training(logs, state) if "loss" in logs else self._read_evaluation(logs)
        if not data:
            return
        metrics = self._attempt.outcome.metrics
        if "train_loss" in data:
            metrics.setdefault("first_train_loss", data["train_loss"])
        if state.global_step == 0:
            metrics.update(
                {f"{name}_before": value for name, value in data.items() if name.startswith("valid_")}
            )
        held_out = {name: value for name, value in data.items() if name.startswith("valid_")}
        if held_out:
            self._attempt.evaluation.note(state.global_step, **held_out)
        told = ("train_", "valid_", "full_valid_")
        metrics.update({name: value for name, value in data.items() if name.startswith(told)})
        self._attempt.events.metrics(state.global_step, total_steps=state.max_steps, data=data)

    def _read_training(self, logs: dict[str, float], state: TrainerState) -> dict[str, Any]:
        outcome = self._attempt.outcome
        data: dict[str, Any] = {
            "train_loss": logs["loss"],
            **{f"train_{name}": logs.get(key) for key, name in self._reported.items()},
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "epoch": state.epoch,
        }
        tokens = int(logs.get("num_tokens", outcome.trained_tokens))
        if self._steps and self._spent_s > 0:
            data["step_time_s"] = self._spent_s / self._steps
            data["tokens_per_s"] = (tokens - outcome.trained_tokens) / self._spent_s
        outcome.trained_tokens = tokens
        self._spent_s, self._steps = 0.0, 0
        return {name: value for name, value in data.items() if value is not None}

    def _read_evaluation(self, logs: dict[str, float]) -> dict[str, Any]:
        if "eval_loss" not in logs:
            return {}
        data: dict[str, Any] = {}
        # Every evaluation covers the whole validation file, so it is the full one as well.
        for key, name in self._evaluated.items():
            if (value := logs.get(f"eval_{key}")) is not None:
                data |= {f"valid_{name}": value, f"full_valid_{name}": value}
        return data
