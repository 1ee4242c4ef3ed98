"""Some of the answers that a model learns from, as events: numbers alone do not tell a good reward
from a fooled one."""

from collections.abc import Sequence
from typing import Any

from trainers.folders.events import Events
from trainers.tokens.prompts import read_prompt

_SHOWN = 2  # answers at a time
_SHOWN_CHARS = 2000


def show_answers(
    events: Events,
    prompt_bytes: Sequence[Any],
    answers: Sequence[str],
    *,
    rewards: Sequence[float],
    ended: Sequence[bool],
    step: int,
) -> None:
    """Tells the first of some answers of a step, each with the question that it answers."""
    shown = list(zip(prompt_bytes, answers, rewards, ended, strict=True))[:_SHOWN]
    for prompt, answer, reward, whole in shown:
        events.message(
            f"Step {step}: an answer of reward {reward:.3f}",
            code="sample",
            prompt=str(read_prompt(prompt).messages[-1]["content"])[:_SHOWN_CHARS],
            completion=answer[:_SHOWN_CHARS],
            reward=reward,
            ended=whole,
        )
