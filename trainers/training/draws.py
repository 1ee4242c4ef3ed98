"""Answers drawn from a model, and what chance decides: which rows a step has, and the seed of each answer."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

_DRAWN_TOGETHER = 32  # sequences whose caches are in memory at once


@dataclass(frozen=True)
class Texts:
    """Prompts padded on the left, each with a response padded on the right."""

    tokens: Tensor  # [rows, prompt + response]
    attention: Tensor  # as tokens: 1 on text, 0 on padding
    n_prompt: int  # columns before the responses
    mask: Tensor  # [rows, response]: true on a response's tokens
    ended: Tensor  # [rows]: whether the response came to a stop token

    @property
    def responses(self) -> Tensor:
        """[rows, response] token ids."""
        return self.tokens[:, self.n_prompt :]

    def take(self, rows: Any) -> "Texts":
        """Some of the rows, by a slice or by their numbers."""
        return Texts(
            self.tokens[rows], self.attention[rows], self.n_prompt, self.mask[rows], self.ended[rows]
        )


@torch.no_grad()
def draw_answers(
    model: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    seeds: list[int],
    stop_ids: list[int],
    pad_id: int,
    temperature: float = 1.0,
) -> Texts:
    """A response to each prompt, drawn from the model's own distribution: nothing of it is cut off.

    A seed for each: what is drawn depends on neither its neighbours nor their number. The model should be in
    evaluation mode, for its dropout and because activation checkpointing would switch its cache off.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=model.device)
    attention = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]).to(ids)
    settings = GenerationConfig(
        do_sample=False,  # RowNoise draws
        repetition_penalty=1.0,
        eos_token_id=stop_ids,
        pad_token_id=pad_id,
    )
    chunks = []
    with generating_by(model, settings):
        for start in range(0, len(ids), _DRAWN_TOGETHER):
            part = slice(start, start + _DRAWN_TOGETHER)
            processors: list[LogitsProcessor] = (
                [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
            )
            processors.append(RowNoise(seeds[part], device=model.device))
            chunks.append(
                model.generate(
                    input_ids=ids[part],
                    attention_mask=attention[part],
                    max_new_tokens=max_new_tokens,
                    logits_processor=LogitsProcessorList(processors),
                )
            )
    width = max(chunk.shape[1] for chunk in chunks)
    tokens = torch.full((len(ids), width), pad_id, device=model.device)
    for i, chunk in enumerate(chunks):
        start = i * _DRAWN_TOGETHER
        tokens[start : start + len(chunk), : chunk.shape[1]] = chunk
    mask, ended = mask_responses(tokens[:, longest:], stop_ids)
    return Texts(tokens, torch.cat([attention, mask.to(attention)], 1), longest, mask, ended)


@contextmanager
def generating_by(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Within it, `settings` are all that generation knows: a model's own (top-k, penalties) would fill what
    they leave open. Afterwards the model has its own again, to be saved with it."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own, base.generation_config = base.generation_config, settings
    try:
        yield
    finally:
        base.generation_config = own


class RowNoise(LogitsProcessor):
    """Gumbel noise from each row's own source: the token of the largest sum is a draw from the softmax."""

    def __init__(self, seeds: list[int], *, device: torch.device):
        self._sources = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """[rows, vocabulary] logits with the noise of the next token."""
        noise = torch.empty_like(scores)
        for row, source in zip(noise, self._sources, strict=True):
            row.exponential_(generator=source)
        return scores.sub_(noise.log_())


def mask_responses(tokens: Tensor, stop_ids: list[int]) -> tuple[Tensor, Tensor]:
    """(mask, whether each response has ended). Padding may share an id with a stop token: ids alone lie."""
    stops = torch.isin(tokens, torch.tensor(stop_ids, device=tokens.device))
    stopped_before = stops.cumsum(1) - stops.long()
    return stopped_before == 0, stops.any(1)


def hash_seed(*parts: int | str) -> int:
    """A seed that has nothing to do with those of other parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


def choose_rows(step: int, *, n_rows: int, batch_size: int, seed: int) -> list[int]:
    """The rows of a step, counted from 0: each comes once before any comes again, in a new order then."""
    places = [divmod(position, n_rows) for position in range(step * batch_size, (step + 1) * batch_size)]
    return [_order_rows(epoch, n_rows=n_rows, seed=seed)[place] for epoch, place in places]


@lru_cache(maxsize=2)  # a step is in one round through the rows, or in two
def _order_rows(epoch: int, *, n_rows: int, seed: int) -> list[int]:
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed((seed << 20) + epoch)).tolist()
