"""How each request's next token is chosen, inside transformers' continuous batching.

The batch takes the argmax of the processed logits. A request that samples first adds Gumbel noise of its own,
which makes the argmax a draw from softmax(logits): every request has its own seed, and greedy ones share the
batch unharmed. The processors keep facts of the batch in preparation: no CUDA graphs, no async batching.
"""

import hashlib
from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

GREEDY_BELOW = 1e-4  # dividing float32 logits by less overflows
_NO_TOP_K = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """One request's settings. `seed` names its noise: equal seeds draw equal tokens from equal logits."""

    seed: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def to_kwargs(self) -> dict[str, Any]:
        """Arguments of add_request; what is left out is neutral."""
        kwargs: dict[str, Any] = {}
        if self.presence_penalty or self.frequency_penalty:
            kwargs["presence_penalty"] = float(self.presence_penalty)
            kwargs["frequency_penalty"] = float(self.frequency_penalty)
        if self.temperature < GREEDY_BELOW:
            return kwargs
        kwargs |= {"noise_seed": self.seed, "temperature": float(self.temperature)}
        if self.top_p < 1:
            kwargs["top_p"] = float(self.top_p)
        if self.top_k:
            kwargs["top_k"] = self.top_k
        return kwargs


def build_processors() -> ContinuousBatchingLogitsProcessorList:
    """Penalties, temperature, top-k, top-p and noise, in this order, per request and neutral by default."""
    processors = [
        Penalties(),
        ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0)),
        TopK(TopKLogitsWarper(_NO_TOP_K)),
        TopP(TopPLogitsWarper(1.0)),
        GumbelNoise(),
    ]
    processor_list = ContinuousBatchingLogitsProcessorList(LogitsProcessorList(processors))
    processor_list.tensors_required = len(processors)  # counted only for those it converts itself
    return processor_list


class TopK(ContinuousBatchingTopKLogitsWarper):
    """Top-k on the rows that ask for it: on CPU, sorting the vocabulary for all of them is slow."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        limits = tensor_arg[: scores.size(0)]
        rows = (limits < scores.size(-1)).nonzero().flatten()
        if rows.numel():
            scores[rows] = super().__call__(scores[rows], limits[rows])
        return scores


class TopP(ContinuousBatchingTopPLogitsWarper):
    """Top-p on the rows that ask for it."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        limits = tensor_arg[: scores.size(0)]
        rows = (limits.view(dtype=torch.float32) < 1).nonzero().flatten()
        if rows.numel():
            scores[rows] = super().__call__(scores[rows], limits[rows])
        return scores


class _BatchFacts(ContinuousBatchingLogitsProcessor):
    """A processor whose settings do not fit one int32 a request: it notes them when a batch is prepared."""

    ignored_kwargs: tuple[str, ...] = ()

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        self.note([request.state for request in requests_with_new_token])
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    @abstractmethod
    def note(self, states: list[Any]) -> None:
        """Keep what the batch's requests ask for."""


class Penalties(_BatchFacts):
    """OpenAI's: logit -= count * frequency_penalty + (count > 0) * presence_penalty, on generated tokens."""

    supported_kwargs: dict[str, type] = {"presence_penalty": float, "frequency_penalty": float}  # noqa: RUF012

    def note(self, states: list[Any]) -> None:
        self._rows: list[tuple[int, dict[int, float]]] = []
        for row, state in enumerate(states):
            kwargs = state.logit_processor_kwargs
            if "presence_penalty" not in kwargs:
                continue
            counts = Counter(state.to_generation_output().generated_tokens)
            penalties = {
                token_id: count * kwargs["frequency_penalty"] + kwargs["presence_penalty"]
                for token_id, count in counts.items()
            }
            if penalties:
                self._rows.append((row, penalties))

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        for row, penalties in self._rows:
            token_ids = torch.tensor(list(penalties), device=scores.device)
            scores[row, token_ids] -= torch.tensor(list(penalties.values()), device=scores.device)
        return scores


class GumbelNoise(_BatchFacts):
    """Adds noise to the rows that sample: the argmax is then a draw from their softmax."""

    supported_kwargs: dict[str, type] = {"noise_seed": str}  # noqa: RUF012

    def __init__(self) -> None:
        self._generator: torch.Generator | None = None

    def note(self, states: list[Any]) -> None:
        self._rows: list[tuple[int, int]] = []
        for row, state in enumerate(states):
            seed = state.logit_processor_kwargs.get("noise_seed")
            if seed is not None:
                # By position, so that a request that is evicted and recomputed goes on as it would have.
                text = f"{seed}:{state.position_offset}"
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                self._rows.append((row, int.from_bytes(digest, "little") >> 1))

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
        for row, seed in self._rows:
            self._generator.manual_seed(seed)
            noise = torch.empty_like(scores[row]).exponential_(generator=self._generator)
            scores[row] -= noise.clamp_min_(1e-30).log_()
        return scores
