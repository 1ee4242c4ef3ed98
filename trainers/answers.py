"""A model in training answers the run's fixed prompts, and training goes on as if nobody had asked."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from trainers.adapters import find_stop_ids
from trainers.attempt import Attempt
from trainers.ranks import StopRequest, any_rank, rank

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
        with torch.random.fork_rng(devices), _answering(model, tokenizer) as (base, settings):
            settings.max_new_tokens = attempt.spec.settings().eval_max_tokens
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


@contextmanager
def _answering(model: Any, tokenizer: Any) -> Iterator[tuple[Any, GenerationConfig]]:
    """(the model below a PEFT wrapper, its settings while it answers), without dropout."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    stop_ids = find_stop_ids(tokenizer, base.generation_config.eos_token_id)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=stop_ids or None, pad_token_id=pad_id
    )
    # The model's own settings (penalties, a minimal length) would fill what is left open.
    was_training, own_settings, base.generation_config = model.training, base.generation_config, settings
    model.eval()
    try:
        yield base, settings
    finally:
        base.generation_config = own_settings
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
