"""What PPO tells while it runs: numbers, curves, and some of the answers."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerState

from trainers.rl.ppo_checkpoints import Learner
from trainers.rl.samples import show_answers
from trainers.specs.parameters import Training
from trainers.training.attempt import Attempt
from trainers.training.draws import Texts
from trainers.training.ranks import rank, world_size

_UNPREFIXED = ("learning_rate", "epoch", "grad_norm", "step_time_s", "tokens_per_s", "optimizer_steps")


class PpoReport:
    """Turns what was measured into events and keeps the outcome up to date."""

    def __init__(self, attempt: Attempt, state: TrainerState):
        self._attempt, self._state = attempt, state
        self._curves = SummaryWriter(str(attempt.run_dir / "tensorboard")) if rank() == 0 else None

    def step(self, numbers: dict[str, Any]) -> None:
        """The numbers of the round that has just ended."""
        state, metrics = self._state, self._attempt.outcome.metrics
        data = {name if name in _UNPREFIXED else f"train_{name}": value for name, value in numbers.items()}
        for name in ("train_reward", "train_reward_std"):
            metrics.setdefault(f"first_{name}", data[name])
        metrics.update({name: value for name, value in data.items() if name.startswith("train_")})
        state.log_history.append({"step": state.global_step, **data})
        self._attempt.events.metrics(state.global_step, total_steps=state.max_steps, data=data)
        if self._curves:
            for name, value in data.items():
                self._curves.add_scalar(f"train/{name.removeprefix('train_')}", value, state.global_step)

    def evaluation(self, reward: float) -> None:
        """The mean reward on the validation file."""
        step, metrics = self._state.global_step, self._attempt.outcome.metrics
        data = {"valid_reward": reward, "full_valid_reward": reward}  # each evaluation covers the whole file
        if step == 0:
            metrics["valid_reward_before"] = reward
        metrics.update(data)
        self._state.log_history.append({"step": step, **data})
        self._attempt.evaluation.note(step, valid_reward=reward)
        self._attempt.events.metrics(step, total_steps=self._state.max_steps, data=data)

    def has_evaluated(self) -> bool:
        """Whether the evaluation of this step is behind us."""
        logs = self._state.log_history
        return any(log["step"] == self._state.global_step and "valid_reward" in log for log in logs)

    def answers(self, texts: Texts, scores: Tensor, prompt_bytes: Any, tokenizer: Any) -> None:
        """Some of this rank's answers."""
        answers = [
            tokenizer.decode(tokens[mask], skip_special_tokens=True)
            for tokens, mask in zip(texts.responses, texts.mask, strict=True)
        ]
        show_answers(
            self._attempt.events,
            prompt_bytes,
            answers,
            rewards=scores.tolist(),
            ended=texts.ended.tolist(),
            step=self._state.global_step,
        )

    def close(self) -> None:
        """Ends the curves' file."""
        if self._curves:
            self._curves.close()


def wants_checkpointing(settings: Training) -> bool:
    """Whether activations are computed twice: worth it where memory is short."""
    wanted = settings.gradient_checkpointing
    return torch.cuda.is_available() if wanted == "auto" else wanted


def describe(attempt: Attempt, *, learner: Learner, scorer: Any, dtype: torch.dtype) -> None:
    """Tells what "auto" came to on this machine."""
    policy, settings = learner.policy, attempt.spec.settings()
    trainable = sum(p.numel() for p in [*policy.adapter_parameters, *policy.head.parameters()])
    name = str(dtype).removeprefix("torch.")
    attempt.events.message(
        f"{trainable:,} trainable parameters, {learner.state.max_steps} rounds of "
        f"{settings.batch_size} answers on {world_size()} processes, {name} on {policy.device.type}; "
        f"rewards from {scorer.where}",
        code="configured",
        trainable_parameters=trainable,
        total_steps=learner.state.max_steps,
        micro_batch_size=settings.micro_batch_size,
        gradient_checkpointing=wants_checkpointing(settings),
        dtype=name,
        device=policy.device.type,
    )
