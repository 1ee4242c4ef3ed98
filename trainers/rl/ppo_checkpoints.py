"""What PPO keeps: the adapter as everyone reads it, and beside it what only a resumed run needs."""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from trainers.folders.artifacts import write_json
from trainers.folders.checkpoints import Checkpoint, stage
from trainers.folders.exits import NanLoss
from trainers.rl.ppo_losses import KlController
from trainers.rl.ppo_roles import POLICY, Policy
from trainers.training.answers import answer_prompts
from trainers.training.attempt import Attempt
from trainers.training.ranks import barrier, rank

_HEAD_FILE = "value_head.safetensors"
_OPTIMIZER_FILE = "optimizer.pt"
_PROGRESS_FILE = "progress.json"
_STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Trained:
    """The weights and the optimizer's state of one moment."""

    weights: list[torch.Tensor]
    optimizer: dict[str, Any]


@dataclass
class Learner:
    """All that changes while a policy learns. Every rank holds the same; there is no random state in it,
    because each step seeds its own."""

    policy: Policy
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    kl: KlController
    state: TrainerState
    model_id: str

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The adapter's parameters, then the value head's."""
        return [*self.policy.adapter_parameters, *self.policy.head.parameters()]

    def copy_trained(self) -> Trained:
        """What the passes over a round change, to go back to where one is cut short."""
        weights = [parameter.detach().clone() for parameter in self.trained]
        return Trained(weights, deepcopy(self.optimizer.state_dict()))

    @torch.no_grad()
    def put_back(self, earlier: Trained) -> None:
        """Undoes what has been learnt since the copy was made."""
        for parameter, weights in zip(self.trained, earlier.weights, strict=True):
            parameter.copy_(weights)
        self.optimizer.load_state_dict(earlier.optimizer)

    def answer(self, attempt: Attempt) -> bool:
        """Lets the policy answer the fixed prompts as it is. Every rank calls it. False: a stop came."""
        step = self.state.global_step
        answered = answer_prompts(self.policy.model, attempt, tokenizer=self.tokenizer, step=step)
        attempt.events.phase("training")
        return answered

    def write_adapter(self, folder: Path) -> None:
        """The policy's adapter and the tokenizer, without value head or reward. Every rank calls it."""
        if rank() == 0:
            self.policy.model.save_pretrained(folder, selected_adapters=[POLICY], save_embedding_layers=False)
            self.tokenizer.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)  # a model card about the base model's path
            config = json.loads((folder / "adapter_config.json").read_bytes())
            # The path on this machine says nothing elsewhere.
            config["base_model_name_or_path"] = self.model_id
            write_json(folder / "adapter_config.json", config)
        barrier()


def save_checkpoint(learner: Learner, attempt: Attempt, *, keep: int) -> None:
    """Writes, seals and announces a checkpoint of the step that has just ended. Every rank calls it."""
    step, outcome = learner.state.global_step, attempt.outcome
    attempt.events.phase("saving")
    for name, parameter in learner.policy.model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise NanLoss(f"the weights of {name} are not finite at step {step}")
    root = attempt.run_dir / "checkpoints"
    if rank() == 0:
        stage(root, step=step)
    learner.write_adapter(root / f"step-{step}.tmp")
    if rank() == 0:
        staged = root / f"step-{step}.tmp"
        save_file(learner.policy.head.state_dict(), staged / _HEAD_FILE)
        moving = {"optimizer": learner.optimizer.state_dict(), "scheduler": learner.scheduler.state_dict()}
        torch.save(moving, staged / _OPTIMIZER_FILE)
        learner.state.save_to_json(str(staged / _STATE_FILE))
        progress = {
            "kl_coef": learner.kl.coefficient,
            "trained_tokens": outcome.trained_tokens,
            "metrics": outcome.metrics,
        }
        write_json(staged / _PROGRESS_FILE, progress)
        told = [name for name in outcome.metrics if name.startswith(("train_", "valid_"))]
        attempt.seal_checkpoint(staged, step=step, keep=keep, figures=told)
    barrier()
    attempt.events.phase("training")


def restore(learner: Learner, attempt: Attempt, resume: Checkpoint) -> None:
    """Puts everything back as it was at the end of the checkpoint's step."""
    policy, path = learner.policy, resume.path
    weights = load_file(path / "adapter_model.safetensors")
    set_peft_model_state_dict(policy.model, weights, adapter_name=POLICY)
    policy.head.load_state_dict(load_file(path / _HEAD_FILE))
    moving = torch.load(path / _OPTIMIZER_FILE, map_location=policy.device, weights_only=True)
    learner.optimizer.load_state_dict(moving["optimizer"])
    learner.scheduler.load_state_dict(moving["scheduler"])
    learner.state = TrainerState.load_from_json(str(path / _STATE_FILE))
    progress = json.loads((path / _PROGRESS_FILE).read_bytes())
    learner.kl.coefficient = progress["kl_coef"]
    attempt.outcome.step = resume.step
    attempt.outcome.trained_tokens = progress["trained_tokens"]
    attempt.outcome.metrics.update(progress["metrics"])
    attempt.evaluation.recall(path)
