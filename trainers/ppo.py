"""Proximal policy optimization against a reward model (Ouyang et al. 2022), on one frozen base.

A step is one round: answers are drawn from the policy and scored, each token's reward is the score at the end
minus a penalty for leaving the model as it was, and a few passes of clipped updates follow. On several
ranks each draws its share; gradients are summed by hand, losses being divided by the tokens of all.
"""

import time
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerState, get_scheduler, set_seed

from trainers.folders.checkpoints import Checkpoint
from trainers.folders.exits import NanLoss
from trainers.models.adapters import find_stop_ids
from trainers.rl.ppo_checkpoints import Learner, restore, save_checkpoint
from trainers.rl.ppo_losses import (
    KlController,
    estimate_advantages,
    explain_variance,
    place_rewards,
    policy_loss,
    value_loss,
    whiten,
)
from trainers.rl.ppo_report import PpoReport, describe, wants_checkpointing
from trainers.rl.ppo_reward import load_scorer
from trainers.rl.ppo_roles import Policy, Predicted
from trainers.specs.methods import ResolvedPpo
from trainers.tokens.prompts import check_room, read_prompt
from trainers.training import recipe
from trainers.training.attempt import Attempt
from trainers.training.draws import Texts, choose_rows, hash_seed
from trainers.training.ranks import any_rank, rank, sum_ranks, world_size


def train(attempt: Attempt, *, prepared: dict[str, Any], resume: Checkpoint | None) -> None:
    """Trains an adapter into RUN_DIR/output, or until asked to stop."""
    spec, settings = attempt.spec, attempt.spec.settings()
    assert isinstance(settings, ResolvedPpo)
    materials = recipe.gather_materials(attempt, prepared)
    rows, valid_rows = materials.train_rows, materials.valid_rows
    check_room(
        [rows] if valid_rows is None else [rows, valid_rows],
        model_dir=spec.model_dir,
        output_max_length=settings.output_max_length,
    )
    tokenizer, dtype = materials.tokenizer, materials.dtype
    set_seed(spec.seed)  # the adapter starts out random, and alike on every rank
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    base: Any = recipe.load_base(AutoModelForCausalLM, attempt, dtype=dtype)
    base.to(device)
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
    trainer.run(valid_rows)


@dataclass(frozen=True)
class Rollout:
    """Answers of this rank, and what was thought of them when they were drawn."""

    texts: Texts
    logprobs: Tensor  # [rows, response], like the next three
    ref_logprobs: Tensor
    values: Tensor
    entropies: Tensor
    scores: Tensor  # [rows]
    # With its graph, where one part is all: the first pass would predict the very same again.
    live: Predicted | None = None


class RoundCut(Exception):
    """Asked to stop within a round: it will be gone through again from its start."""


class PpoTrainer:
    """Rounds of sampling and learning, from the learner's step to the last."""

    def __init__(
        self, attempt: Attempt, *, learner: Learner, scorer: Any, rows: Dataset, settings: ResolvedPpo
    ):
        self._attempt, self._learner, self._scorer = attempt, learner, scorer
        self._rows, self._settings = rows, settings
        self._checkpointing = wants_checkpointing(settings)
        self._report = PpoReport(attempt, learner.state)
        self._saved_step = learner.state.global_step

    def run(self, valid_rows: Dataset | None) -> None:
        """Learns to the end or to a stop, and says in the outcome which."""
        attempt, state, began = self._attempt, self._learner.state, time.perf_counter()
        outcome = attempt.outcome
        try:
            self._go_through(valid_rows)
        except RoundCut:
            self._save()
            outcome.reason = "stopped"
            outcome.message = f"stopped after step {outcome.step} of {state.max_steps}"
            return
        attempt.events.phase("saving")
        summary = {k: v for k, v in outcome.metrics.items() if k.startswith("train_")}
        summary["train_runtime"] = time.perf_counter() - began
        recipe.save_output(attempt, trainer=self._learner, summary=summary)
        self._report.close()
        outcome.reason, outcome.message = "done", f"trained for {outcome.step} steps"

    def _go_through(self, valid_rows: Dataset | None) -> None:
        """The rounds that are left. Raises RoundCut, the learner being as at the end of its last step."""
        settings, state = self._settings, self._learner.state
        self._attempt.events.phase("training")
        while True:
            step, last = state.global_step, state.global_step == state.max_steps
            if valid_rows is not None and (last or step % settings.eval_steps == 0):
                self._evaluate(valid_rows, may_stop=not last)
            if last or step % settings.save_steps == 0:
                if not self._learner.answer(self._attempt) and not last:
                    raise RoundCut
                self._save()
            if last:
                return
            self._take_step()

    def _save(self) -> None:
        """A checkpoint of the last step, unless there is one."""
        if self._learner.state.global_step > self._saved_step:
            save_checkpoint(self._learner, self._attempt, keep=self._settings.save_total_limit)
            self._saved_step = self._learner.state.global_step

    def _heed_stop(self) -> None:
        """Raises RoundCut on every rank when one was asked to stop: all must call it at the same point."""
        if any_rank(self._attempt.stop.requested)[0]:
            raise RoundCut

    def _take_step(self) -> None:
        learner, settings, state = self._learner, self._settings, self._learner.state
        began, step = time.perf_counter(), state.global_step
        seed = self._attempt.spec.seed
        # A step's randomness is its own, so that a resumed run draws as the uninterrupted one would.
        # So is an answer's: the answers are the same, however many processes share the rows.
        torch.manual_seed(hash_seed(seed, step, rank()))
        chosen = choose_rows(step, n_rows=len(self._rows), batch_size=settings.batch_size, seed=seed)
        mine = self._rows.select(chosen[rank() :: world_size()])
        places = range(rank(), settings.batch_size, world_size())
        rollout = self._collect(mine, seeds=[hash_seed(seed, step, "answer", place) for place in places])
        numbers = self._describe_rollout(rollout)
        before = learner.copy_trained()
        try:
            numbers |= self._learn(rollout)
        except RoundCut:
            learner.put_back(before)
            raise
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
            self._report.answers(rollout.texts, rollout.scores, mine["prompt_bytes"], learner.tokenizer)

    # Answering

    def _collect(self, rows: Any, *, seeds: list[int]) -> Rollout:
        """Draws an answer to each prompt, and lets every role look at it."""
        self._heed_stop()
        policy, size = self._learner.policy, self._settings.micro_batch_size
        mini_size = self._settings.mini_batch_size or len(rows)
        keeps_graph = len(rows) <= min(size, mini_size) and not self._checkpointing
        prompts = [read_prompt(row) for row in rows["prompt_bytes"]]
        texts = policy.sample(
            list(rows["prompt_ids"]), max_new_tokens=self._settings.output_max_length, seeds=seeds
        )
        seen, live = [], None
        for start in range(0, len(rows), size):
            self._heed_stop()
            part = texts.take(slice(start, start + size))
            reference = policy.predict_reference(part)
            scores = self._scorer.score(part, prompts[start : start + size])
            # Last: no other role may come between it and its backward pass.
            with torch.set_grad_enabled(keeps_graph):
                said = policy.predict(part)
            live = said if keeps_graph else None
            logprobs, values = said.logprobs.detach(), said.values.detach()
            seen.append((logprobs, reference, values, said.entropies, scores))
        rollout = Rollout(texts, *(torch.cat(column) for column in zip(*seen, strict=True)), live=live)
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
        for number in range(settings.ppo_epochs):
            order = torch.randperm(len(scores)).to(mask.device)
            parts = order.split(settings.mini_batch_size or len(order))
            ahead = rollout.live if number == 0 else None
            if ahead:
                parts = (order.sort().values,)
            passes = [self._optimize(targets, part, ahead=ahead) for part in parts]
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

    def _optimize(self, targets: "Targets", rows: Tensor, *, ahead: Predicted | None = None) -> Tensor:
        """One optimizer step on some of this rank's rows, and on as many of every other rank's.

        ahead: what the policy says of them, where it has been asked already.
        Returns [policy loss, value loss, clipped fraction, KL moved, gradient norm], per token of all ranks.
        """
        self._heed_stop()
        settings, policy = self._settings, self._learner.policy
        rollout, mask = targets.rollout, targets.rollout.texts.mask
        n_tokens = sum_ranks(mask[rows].sum())
        totals = torch.zeros(4, device=mask.device)
        with policy.checkpointing(self._checkpointing):
            for part in rows.split(settings.micro_batch_size):
                new = ahead or policy.predict(rollout.texts.take(part), with_entropies=False)
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
    def _evaluate(self, rows: Dataset, *, may_stop: bool = True) -> None:
        """The mean reward of answers to prompts that are not trained on, drawn alike each time."""
        attempt, size = self._attempt, self._settings.micro_batch_size
        if self._report.has_evaluated():  # before the stop that this run goes on from
            return
        attempt.events.phase("evaluating")
        mine = range(rank(), len(rows), world_size())
        totals = torch.zeros(2, dtype=torch.float64)
        for start in range(0, ceil(len(rows) / world_size()), size):
            if may_stop:
                self._heed_stop()
            places = mine[start : start + size]
            if not places:  # other ranks have one row more
                continue
            part = rows.select(places)
            texts = self._learner.policy.sample(
                list(part["prompt_ids"]),
                max_new_tokens=self._settings.output_max_length,
                seeds=[hash_seed(attempt.spec.seed, "evaluation", place) for place in places],
            )
            scores = self._scorer.score(texts, [read_prompt(row) for row in part["prompt_bytes"]])
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
