"""Proximal policy optimization against a reward model (Ouyang et al. 2022), on one frozen base.

A step is one round: answers are drawn from the policy and scored, each token's reward is the score at the end
minus a penalty for leaving the model as it was, and a few passes of clipped updates follow. On several
ranks each draws its share; gradients are summed by hand, losses being divided by the tokens of all.
"""

import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerState, get_scheduler, set_seed

from trainers import recipe
from trainers.adapters import find_stop_ids
from trainers.attempt import Attempt
from trainers.checkpoints import Checkpoint
from trainers.data import load_tokenizer
from trainers.exits import NanLoss
from trainers.ppo_checkpoints import Learner, restore, save_checkpoint
from trainers.ppo_losses import (
    KlController,
    estimate_advantages,
    explain_variance,
    place_rewards,
    policy_loss,
    value_loss,
    whiten,
)
from trainers.ppo_report import PpoReport, describe, wants_checkpointing
from trainers.ppo_reward import load_scorer
from trainers.ppo_roles import Policy, Texts
from trainers.prompts import read_messages
from trainers.ranks import any_rank, rank, sum_ranks, world_size
from trainers.specs.methods import ResolvedPpo


def train(attempt: Attempt, *, prepared: dict[str, Any], resume: Checkpoint | None) -> None:
    """Trains an adapter into RUN_DIR/output, or until asked to stop."""
    attempt.events.phase("loading")
    spec, settings = attempt.spec, attempt.spec.settings()
    assert isinstance(settings, ResolvedPpo)
    rows = recipe.load_rows(prepared["train"])
    dtype = recipe.choose_dtype(settings.dtype, events=attempt.events)
    if dtype == torch.float16:
        dtype = torch.float32
        attempt.events.message("ppo trains in float32, not float16", level="warn", code="dtype_changed")
    set_seed(spec.seed)  # the adapter starts out random, and alike on every rank
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    base: Any = recipe.load_base(AutoModelForCausalLM, attempt, dtype=dtype)
    base.to(device)
    tokenizer: Any = load_tokenizer(Path(prepared["tokenizer"]))
    stop_ids = find_stop_ids(tokenizer, base.generation_config.eos_token_id)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    lora = recipe.configure_lora(settings, task_type="CAUSAL_LM")
    assert lora is not None  # its specs refuse use_peft=false
    policy = Policy(base, lora, stop_ids=stop_ids, pad_id=pad_id)
    scorer = load_scorer(spec, policy, tokenizer=tokenizer, dtype=dtype)
    total_steps = settings.max_steps or settings.n_epochs * ceil(len(rows) / settings.batch_size)
    optimizer = torch.optim.AdamW(
        [
            {"params": policy.adapter_parameters, "weight_decay": settings.weight_decay},
            {"params": list(policy.head.parameters()), "lr": settings.value_learning_rate},
        ],
        lr=settings.learning_rate,
        weight_decay=0.0,
    )
    warmup_steps = int(total_steps * settings.warmup_ratio)
    learner = Learner(
        policy,
        tokenizer,
        optimizer,
        get_scheduler(settings.lr_scheduler_type, optimizer, warmup_steps, total_steps),
        KlController(settings.init_kl_coef, target=settings.target_kl, horizon=settings.horizon),
        TrainerState(max_steps=total_steps, num_train_epochs=settings.n_epochs),
        spec.model_id,
    )
    if resume:
        restore(learner, attempt, resume)
    trainer = PpoTrainer(attempt, learner=learner, scorer=scorer, rows=rows, settings=settings)
    describe(attempt, learner=learner, scorer=scorer, dtype=dtype)
    trainer.run(recipe.load_rows(prepared["validation"]) if prepared["validation"] else None)


@dataclass(frozen=True)
class Rollout:
    """Answers of this rank, and what was thought of them when they were drawn."""

    texts: Texts
    logprobs: Tensor  # [rows, response], like the next three
    ref_logprobs: Tensor
    values: Tensor
    entropies: Tensor
    scores: Tensor  # [rows]


class PpoTrainer:
    """Rounds of sampling and learning, from the learner's step to the last."""

    def __init__(
        self, attempt: Attempt, *, learner: Learner, scorer: Any, rows: Dataset, settings: ResolvedPpo
    ):
        self._attempt, self._learner, self._scorer = attempt, learner, scorer
        self._rows, self._settings = rows, settings
        self._checkpointing = wants_checkpointing(settings)
        self._report = PpoReport(attempt, learner.state)

    def run(self, valid_rows: Dataset | None) -> None:
        """Learns to the end or to a stop, and says in the outcome which."""
        attempt, learner, settings = self._attempt, self._learner, self._settings
        outcome, state, began = attempt.outcome, learner.state, time.perf_counter()
        if valid_rows is not None and state.global_step == 0:
            self._evaluate(valid_rows)
        attempt.events.phase("training")
        while state.global_step < state.max_steps:
            self._take_step()
            last = state.global_step == state.max_steps
            stop = any_rank(attempt.stop.requested)[0] and not last
            if valid_rows is not None and not stop and (last or state.global_step % settings.eval_steps == 0):
                self._evaluate(valid_rows)
            if stop or last or state.global_step % settings.save_steps == 0:
                save_checkpoint(learner, attempt, keep=settings.save_total_limit)
            if stop:
                outcome.reason = "stopped"
                outcome.message = f"stopped after step {outcome.step} of {state.max_steps}"
                return
        attempt.events.phase("saving")
        summary = {k: v for k, v in outcome.metrics.items() if k.startswith("train_")}
        summary["train_runtime"] = time.perf_counter() - began
        recipe.save_output(attempt.run_dir, trainer=learner, summary=summary, metrics=outcome.metrics)
        self._report.close()
        outcome.reason, outcome.message = "done", f"trained for {outcome.step} steps"

    def _take_step(self) -> None:
        learner, settings, state = self._learner, self._settings, self._learner.state
        began, step = time.perf_counter(), state.global_step
        # A step's randomness is its own, so that a resumed run draws as the uninterrupted one would.
        torch.manual_seed(((self._attempt.spec.seed << 20) + step) * world_size() + rank())
        chosen = choose_rows(
            step, n_rows=len(self._rows), batch_size=settings.batch_size, seed=self._attempt.spec.seed
        )
        mine = self._rows.select(chosen[rank() :: world_size()])
        rollout = self._collect(mine)
        numbers = self._describe_rollout(rollout)
        numbers |= self._learn(rollout)
        numbers["learning_rate"] = learner.scheduler.get_last_lr()[0]
        learner.kl.update(numbers["kl"], n_responses=settings.batch_size)
        learner.scheduler.step()
        state.global_step = self._attempt.outcome.step = step + 1
        state.epoch = state.global_step * settings.batch_size / len(self._rows)
        n_tokens, spent_s = numbers.pop("n_tokens"), time.perf_counter() - began
        self._attempt.outcome.trained_tokens += n_tokens
        numbers |= {"epoch": state.epoch, "step_time_s": spent_s, "tokens_per_s": n_tokens / spent_s}
        due = state.global_step % settings.logging_steps == 0 or state.global_step == state.max_steps
        if step == 0 or due:
            self._report.step(numbers)
        if step == 0 or state.global_step % settings.save_steps == 0:
            self._report.answers(rollout.texts, rollout.scores, mine["message_bytes"], learner.tokenizer)

    # Answering

    @torch.no_grad()
    def _collect(self, rows: Any) -> Rollout:
        """Draws an answer to each prompt, and lets every role look at it."""
        policy, size = self._learner.policy, self._settings.micro_batch_size
        messages = [read_messages(row) for row in rows["message_bytes"]]
        texts = policy.sample(list(rows["prompt_ids"]), max_new_tokens=self._settings.output_max_length)
        seen = []
        for start in range(0, len(rows), size):
            part = texts.take(slice(start, start + size))
            said = policy.predict(part)
            reference = policy.predict_reference(part)
            scores = self._scorer.score(part, messages[start : start + size])
            seen.append((said.logprobs, reference, said.values, said.entropies, scores))
        rollout = Rollout(texts, *(torch.cat(column) for column in zip(*seen, strict=True)))
        columns = (rollout.logprobs, rollout.ref_logprobs, rollout.values, rollout.scores)
        if any_rank(not all(bool(torch.isfinite(column).all()) for column in columns))[0]:
            raise NanLoss(
                f"the policy or the reward model gives no finite numbers at step "
                f"{self._learner.state.global_step + 1}: lower the learning rate"
            )
        return rollout

    def _describe_rollout(self, rollout: Rollout) -> dict[str, Any]:
        """Means over the answers of all ranks. `kl` is in nats a token, away from the model as it was."""
        mask, scores = rollout.texts.mask, rollout.scores
        totals = torch.stack(
            [
                mask.sum(),
                ((rollout.logprobs - rollout.ref_logprobs) * mask).sum(),
                rollout.entropies.sum(),
                torch.tensor(len(scores), device=scores.device),
                scores.sum(),
                scores.square().sum(),
                rollout.texts.ended.sum(),
            ]
        ).double()
        tokens, kl, entropy, count, score, squares, ended = sum_ranks(totals).tolist()
        return {
            "n_tokens": int(tokens),
            "reward": score / count,
            "reward_std": max(squares / count - (score / count) ** 2, 0.0) ** 0.5,
            "kl": kl / tokens,
            "kl_coef": self._learner.kl.coefficient,
            "entropy": entropy / tokens,
            "response_tokens": tokens / count,
            "ended": ended / count,
        }

    # Learning

    def _learn(self, rollout: Rollout) -> dict[str, float]:
        """Passes over the answers; returns what was measured, averaged over the optimizer steps."""
        settings, mask = self._settings, rollout.texts.mask
        scores = rollout.scores - settings.reward_baseline
        scores = scores - settings.missing_eos_penalty * ~rollout.texts.ended
        rewards = place_rewards(
            rollout.logprobs,
            rollout.ref_logprobs,
            scores,
            mask=mask,
            at=mask.sum(1) - 1,
            kl_coef=self._learner.kl.coefficient,
        )
        advantages = estimate_advantages(rewards, rollout.values, gamma=settings.gamma, lam=settings.lam)
        returns = advantages + rollout.values
        targets = Targets(rollout, whiten(advantages, mask), returns)
        measured: list[Tensor] = []
        for _ in range(settings.ppo_epochs):
            order = torch.randperm(len(scores)).to(mask.device)
            parts = order.split(settings.mini_batch_size or len(order))
            passes = [self._optimize(targets, part) for part in parts]
            measured += passes
            moved = float(torch.stack(passes)[:, 3].mean())
            if settings.early_stopping and moved > 1.5 * settings.target_kl:
                break
        policy, value, clipped, moved, norm = torch.stack(measured).mean(0).tolist()
        return {
            "loss": policy + settings.vf_coef * value,
            "policy_loss": policy,
            "value_loss": value,
            "clip_fraction": clipped,
            "policy_kl": moved,
            "grad_norm": norm,
            "optimizer_steps": len(measured),
            "explained_variance": explain_variance(rollout.values, returns, mask),
        }

    def _optimize(self, targets: "Targets", rows: Tensor) -> Tensor:
        """One optimizer step on some of this rank's rows, and on as many of every other rank's.

        Returns [policy loss, value loss, clipped fraction, KL moved, gradient norm], per token of all ranks.
        """
        settings, policy = self._settings, self._learner.policy
        rollout, mask = targets.rollout, targets.rollout.texts.mask
        n_tokens = sum_ranks(mask[rows].sum())
        totals = torch.zeros(4, device=mask.device)
        with policy.checkpointing(self._checkpointing):
            for part in rows.split(settings.micro_batch_size):
                new = policy.predict(rollout.texts.take(part))
                old, kept = rollout.logprobs[part], mask[part]
                loss, clipped = policy_loss(
                    new.logprobs, old, targets.advantages[part], mask=kept, clip=settings.cliprange
                )
                error = value_loss(
                    new.values,
                    rollout.values[part],
                    targets.returns[part],
                    mask=kept,
                    clip=settings.cliprange_value,
                )
                ((loss + settings.vf_coef * error) / n_tokens).backward()
                moved = 0.5 * ((new.logprobs.detach() - old) * kept).square().sum()
                totals += torch.stack([loss.detach(), error.detach(), clipped, moved])
        measured = torch.cat([sum_ranks(totals) / n_tokens, self._step_optimizer().view(1)])
        if not torch.isfinite(measured).all():
            raise NanLoss(
                f"the loss is not a finite number at step {self._learner.state.global_step + 1}: "
                "lower the learning rate, or look for broken rows"
            )
        return measured

    def _step_optimizer(self) -> Tensor:
        """Sums the gradients over the ranks and moves; the norm of the policy's gradient before the cut."""
        policy, limit = self._learner.policy, self._settings.max_grad_norm
        adapter, head = policy.adapter_parameters, list(policy.head.parameters())
        if world_size() > 1:
            gradients = [p.grad for p in [*adapter, *head] if p.grad is not None]
            summed = sum_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        # Apart: the head's errors are large at first and would leave the policy nothing.
        norm = torch.nn.utils.clip_grad_norm_(adapter, limit)
        torch.nn.utils.clip_grad_norm_(head, limit)
        if torch.isfinite(norm):
            self._learner.optimizer.step()
        self._learner.optimizer.zero_grad()
        return norm

    # Evaluating

    @torch.no_grad()
    def _evaluate(self, rows: Dataset) -> None:
        """The mean reward of answers to prompts that are not trained on, drawn alike each time."""
        attempt, size = self._attempt, self._settings.micro_batch_size
        attempt.events.phase("evaluating")
        torch.manual_seed(attempt.spec.seed + rank())
        mine = rows.select(range(rank(), len(rows), world_size()))
        totals = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(mine), size):
            part = mine.select(range(start, min(start + size, len(mine))))
            texts = self._learner.policy.sample(
                list(part["prompt_ids"]), max_new_tokens=self._settings.output_max_length
            )
            scores = self._scorer.score(texts, [read_messages(row) for row in part["message_bytes"]])
            totals += torch.tensor([float(scores.sum()), len(scores)], dtype=torch.float64)
        score, count = sum_ranks(totals).tolist()
        self._report.evaluation(score / count)
        attempt.events.phase("training")


@dataclass(frozen=True)
class Targets:
    """What the passes over a rollout aim at, [rows, response]."""

    rollout: Rollout
    advantages: Tensor  # whitened
    returns: Tensor


def choose_rows(step: int, *, n_rows: int, batch_size: int, seed: int) -> list[int]:
    """The rows of a step, counted from 0: each comes once before any comes again, in a new order then."""
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, n_rows)
        order = torch.randperm(n_rows, generator=torch.Generator().manual_seed((seed << 20) + epoch))
        rows.append(int(order[place]))
    return rows
