"""A model in training answers the run's fixed prompts, and training goes on as if nobody had asked."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from trainers.models.adapters import find_stop_ids
from trainers.training.attempt import Attempt
from trainers.training.draws import generating_by
from trainers.training.ranks import StopRequest, any_rank, rank

_TOGETHER = 4  # prompts whose caches are in memory at once
_TOLD = 3  # answers that an event shows


def answer_prompts(model: Any, attempt: Attempt, *, tokenizer: Any, step: int, sharded: bool = False) -> bool:
    """Notes greedy answers to the fixed prompts in the attempt's evaluation. Every rank calls it.

    model: as it is, adapter on, without a wrapper. sharded: its weights are spread over the ranks, which
    must then all compute; otherwise the first one does. False when a stop was asked for before or meanwhile:
    then nothing is noted.
    """
    prompts = json.loads((attempt.run_dir / "prepared.json").read_bytes())["prompts"]
    if not prompts or attempt.evaluation.knows(step, "answers"):
        return True
    if any_rank(attempt.stop.requested)[0]:
        return False
    attempt.events.phase("evaluating")
    answers: list[dict[str, Any]] = []
    if sharded or rank() == 0:
        # Left as it was: greedy choices draw nothing, but what a model does inside is its own.
        devices = [model.device] if model.device.type == "cuda" else []
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        settings = _choose_settings(base, tokenizer, max_new_tokens=attempt.spec.settings().eval_max_tokens)
        with torch.random.fork_rng(devices), _resting(model), generating_by(model, settings):
            for start in range(0, len(prompts), _TOGETHER):
                part = prompts[start : start + _TOGETHER]
                answers += _answer(base, part, settings=settings, tokenizer=tokenizer, stop=attempt.stop)
    if any_rank(attempt.stop.requested)[0]:
        return False
    attempt.evaluation.note(step, answers=answers)
    attempt.events.message(
        f"Step {step}: {len(prompts)} fixed prompts answered",
        code="evaluation",
        step=step,
        answers=answers[:_TOLD],
    )
    return True


def _choose_settings(model: Any, tokenizer: Any, *, max_new_tokens: int) -> GenerationConfig:
    stop_ids = find_stop_ids(tokenizer, model.generation_config.eos_token_id)
    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids or None,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


@contextmanager
def _resting(model: Any) -> Iterator[None]:
    """Without dropout within it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def _answer(
    model: Any,
    prompts: list[dict[str, Any]],
    *,
    settings: GenerationConfig,
    tokenizer: Any,
    stop: StopRequest,
) -> list[dict[str, Any]]:
    longest = max(len(prompt["ids"]) for prompt in prompts)
    padding = [longest - len(prompt["ids"]) for prompt in prompts]
    ids = [
        [settings.pad_token_id] * pad + prompt["ids"] for pad, prompt in zip(padding, prompts, strict=True)
    ]
    attention = [[0] * pad + [1] * (longest - pad) for pad in padding]
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(attention, device=model.device),
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([_Stopping(stop)]),
    )
    stop_ids = settings.eos_token_id or []
    answers = []
    for prompt, row in zip(prompts, output[:, longest:].tolist(), strict=True):
        end = next((i for i, token_id in enumerate(row) if token_id in stop_ids), None)
        answers.append(
            {
                "prompt": prompt["prompt"],
                "answer": tokenizer.decode(row[:end], skip_special_tokens=True),
                "finish_reason": "length" if end is None else "stop",
            }
        )
    return answers


class _Stopping(StoppingCriteria):
    """Ends the answers when the run is asked to stop."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:  # noqa: ARG002 - theirs
        return torch.full((len(input_ids),), self._stop.requested, device=input_ids.device)
