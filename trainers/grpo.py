"""Group relative policy optimization (Shao et al. 2024): answers to one prompt are compared with each other.

TRL's trainer; drawing and grading are ours. A batch is drawn, graded and learnt from within one step, so that
a checkpoint lies between batches and a resumed run draws what the uninterrupted one would.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, cast

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import AutoModelForCausalLM
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from trainers.folders.checkpoints import Checkpoint
from trainers.folders.exits import NanLoss
from trainers.models.adapters import find_stop_ids
from trainers.rl.graders import grade
from trainers.rl.samples import show_answers
from trainers.rl.scorers import ScorerBeside, require_head
from trainers.specs.graders import load_grader
from trainers.specs.methods import ResolvedGrpo
from trainers.tokens.prompts import check_room, read_prompt
from trainers.training import recipe
from trainers.training.attempt import Attempt
from trainers.training.draws import choose_rows, draw_answers, hash_seed
from trainers.training.loop import Guarded
from trainers.training.ranks import rank, sum_ranks

# What TRL calls for the rewards of some answers. Columns of the rows come by name.
RewardFunction = Callable[..., list[float]]


def train(attempt: Attempt, *, prepared: dict[str, Any], resume: Checkpoint | None) -> None:
    """Trains an adapter into RUN_DIR/output, or until asked to stop."""
    settings = attempt.spec.settings()
    assert isinstance(settings, ResolvedGrpo)
    materials = recipe.gather_materials(attempt, prepared)
    train_rows, valid_rows = materials.train_rows, materials.valid_rows
    check_room(
        [train_rows] if valid_rows is None else [train_rows, valid_rows],
        model_dir=attempt.spec.model_dir,
        output_max_length=settings.output_max_length,
    )
    tokenizer, dtype = materials.tokenizer, materials.dtype
    recipe.ensure_pad_token(tokenizer)
    shared = recipe.common_arguments(attempt, materials, resume=resume)
    arguments = GRPOConfig(
        **shared,
        num_generations=settings.num_generations,
        num_generations_eval=1,
        steps_per_generation=shared["gradient_accumulation_steps"],
        num_iterations=1,
        max_completion_length=settings.output_max_length,
        temperature=settings.temperature,
        beta=settings.beta,
        loss_type=settings.loss_type,
        scale_rewards=settings.scale_rewards,
        mask_truncated_completions=settings.mask_truncated_completions,
        disable_dropout=True,  # with it, an answer's probability would not be that of its drawing
        remove_unused_columns=False,
    )
    model = recipe.load_base(AutoModelForCausalLM, attempt, dtype=dtype)
    trainer = GroupTrainer(
        model=model,
        reward_funcs=make_reward(attempt, tokenizer=tokenizer, device=arguments.device, dtype=dtype),
        args=arguments,
        train_dataset=train_rows.rename_column("prompt_ids", "prompt"),
        eval_dataset=valid_rows.rename_column("prompt_ids", "prompt") if valid_rows else None,
        processing_class=tokenizer,
        peft_config=recipe.configure_lora(settings, task_type="CAUSAL_LM", model=model),
        attempt=attempt,
        keep_checkpoints=settings.save_total_limit,
    )
    recipe.carry_out(trainer, resume=resume, dtype=dtype)


def make_reward(
    attempt: Attempt, *, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> RewardFunction:
    """What gives answers their numbers: the job's grader, else its reward model. Raises SpecError."""
    settings = attempt.spec.settings()
    assert isinstance(settings, ResolvedGrpo)
    if settings.grader:
        grader = load_grader(settings.grader)

        def apply_grader(completions: list[str], prompt_bytes: list[list[int]], **_: Any) -> list[float]:
            return [
                grade(grader, text, items=read_prompt(row).item)
                for text, row in zip(completions, prompt_bytes, strict=True)
            ]

        return apply_grader
    judge_dir, _ = require_head(attempt.spec)
    judge = ScorerBeside(judge_dir, tokenizer=tokenizer, device=device, dtype=dtype)
    size = settings.micro_batch_size

    def ask_judge(
        completions: list[str], prompt_bytes: list[list[int]], ended: list[bool], **_: Any
    ) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(completions), size):
            part = slice(start, start + size)
            prompts = [read_prompt(row) for row in prompt_bytes[part]]
            scores += judge.score_answers(prompts, completions[part], ended=ended[part]).tolist()
        return scores

    return ask_judge


class GroupTrainer(Guarded, GRPOTrainer):
    """TRL's trainer on prompts that are tokenized already; each answer has a seed of its own."""

    reported: ClassVar = {
        "reward": "reward",
        "reward_std": "reward_std",
        "frac_reward_zero_std": "frac_reward_zero_std",  # of the groups; such a group teaches nothing
        "kl": "kl",
        "entropy": "entropy",
        "completions/mean_length": "response_tokens",
    }
    evaluated: ClassVar = {"reward": "reward", "completions/mean_length": "response_tokens"}

    def __init__(self, *args: Any, **kwargs: Any):
        self._held_out = HeldOut()
        super().__init__(*args, **kwargs)
        model: Any = self.model
        # TRL knows the model's ends, but not that of the template's turns.
        self.eos_token_ids = find_stop_ids(self.processing_class, model.generation_config.eos_token_id)

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler:
        arguments: Any = self.args
        rows: Any = self.train_dataset
        return GroupSampler(
            lambda: self.state.global_step,
            seed=arguments.seed,
            n_rows=len(rows),
            prompts=arguments.generation_batch_size // arguments.num_generations,
            answers=arguments.num_generations,
            passes=arguments.gradient_accumulation_steps,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return SequentialSampler(eval_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._held_out = HeldOut()
        return super().evaluate(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> Any:
        return prompts, None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        """(token ids of an answer to each prompt, no probabilities of them)."""
        model: Any = self.accelerator.unwrap_model(self.model)
        settings = self.attempt.spec.settings()
        assert isinstance(settings, ResolvedGrpo)
        trains, first = model.training, rank() * len(prompt_ids)
        if not trains:
            first += self._held_out.drawn
        step = self.state.global_step if trains else "evaluation"
        places = range(first, first + len(prompt_ids))
        model.eval()
        with self.accelerator.autocast():  # the trainer casts in a forward that generating passes by
            texts = draw_answers(
                model,
                prompt_ids,
                max_new_tokens=settings.output_max_length,
                seeds=[hash_seed(self.args.seed, step, "answer", place) for place in places],
                stop_ids=self.eos_token_ids,
                pad_id=recipe.ensure_pad_token(self.processing_class),
                temperature=settings.temperature,
            )
        model.train(trains)
        if trains:
            self._total_train_tokens += int(sum_ranks(texts.mask.sum()))
        return [tokens[mask].tolist() for tokens, mask in zip(texts.responses, texts.mask, strict=True)], None

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Any:
        ended = [ids[-1] in self.eos_token_ids for ids in completion_ids_list]
        inputs = [row | {"ended": whole} for row, whole in zip(inputs, ended, strict=True)]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        step, model = self.state.global_step, cast(torch.nn.Module, self.model)
        if not torch.isfinite(rewards).all():  # of every rank: they have been gathered
            raise NanLoss(f"a reward is not a finite number at step {step + 1}")
        if not model.training:
            rows: Any = self.eval_dataset
            lengths: Any = self.accelerator.gather(
                torch.tensor([len(ids) for ids in completion_ids_list], device=rewards.device)
            )
            self._held_out.add(rewards[:, 0], lengths, n_rows=len(rows))
        elif step % self.args.save_steps == 0:
            first = rank() * len(inputs)
            show_answers(
                self.attempt.events,
                [row["prompt_bytes"] for row in inputs],
                completions,
                rewards=rewards[first : first + len(inputs), 0].tolist(),
                ended=ended,
                step=step,
            )
        return rewards

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # TRL counts the prompts as well
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        if "eval_loss" in logs:  # TRL averages over batches, however many rows they have
            self._metrics["eval"] |= self._held_out.average()
        super().log(logs, start_time)


@dataclass
class HeldOut:
    """What the answers to held-out prompts come to, added up over the batches of an evaluation."""

    drawn: int = 0  # answers, those to repeated rows included
    count: int = 0  # of the others
    reward: float = 0.0
    tokens: float = 0.0

    def add(self, rewards: torch.Tensor, lengths: torch.Tensor, *, n_rows: int) -> None:
        """A batch of all ranks, [answers]; what is there to fill up the last one comes at its end."""
        new = min(len(rewards), n_rows - self.drawn)
        self.reward += float(rewards[:new].sum())
        self.tokens += float(lengths[:new].sum())
        self.drawn, self.count = self.drawn + len(rewards), self.count + new

    def average(self) -> dict[str, list[float]]:
        """Means over the rows, as TRL keeps its metrics."""
        return {
            "reward": [self.reward / self.count],
            "completions/mean_length": [self.tokens / self.count],
        }


class GroupSampler(Sampler[int]):
    """The rows of an epoch, step by step: a row as often as it is answered, a step as often as it has passes.

    Which rows a step has depends on nothing but the seed and its number; `count_steps` tells how many were
    taken. Where the rows do not fill the last step of an epoch, it begins the next round through them.
    """

    def __init__(
        self,
        count_steps: Callable[[], int],
        *,
        seed: int,
        n_rows: int,
        prompts: int,
        answers: int,
        passes: int,
    ):
        self._count_steps, self._seed, self._n_rows = count_steps, seed, n_rows
        self._prompts, self._answers, self._passes = prompts, answers, passes
        self._steps = ceil(n_rows / prompts)

    def __len__(self) -> int:
        return self._steps * self._prompts * self._answers * self._passes

    def __iter__(self) -> Iterator[int]:
        # A resumed run passes over the steps of its epoch that were taken.
        first = self._count_steps() // self._steps * self._steps
        for step in range(first, first + self._steps):
            rows = choose_rows(step, n_rows=self._n_rows, batch_size=self._prompts, seed=self._seed)
            for _ in range(self._passes):
                for row in rows:
                    yield from [row] * self._answers
