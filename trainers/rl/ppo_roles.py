"""One frozen base in three roles: policy (adapter), reference (adapter off) and values (a head).

PEFT's traps: `set_adapter` and leaving `disable_adapter` switch gradients on and off, so every backward pass
comes before the next change of role, and a frozen role is set with `inference_mode`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainers.training.draws import Texts, draw_answers

POLICY = "default"  # PEFT saves only the adapter of this name where readers look


@dataclass(frozen=True)
class Predicted:
    """What the model says at each response token, [rows, response]; values and entropies of zero after it."""

    logprobs: Tensor
    values: Tensor
    entropies: Tensor


class Policy:
    """The base with its adapter, and a linear value head on its last hidden state.

    The state is detached: the head learns from the policy without pulling at it, which costs no second
    forward pass and keeps memory well below that of a value model. Dropout is off throughout:
    with it, the ratio of new to old probabilities would be noise.
    """

    def __init__(self, base: PreTrainedModel, lora: LoraConfig, *, stop_ids: list[int], pad_id: int):
        self.model: Any = get_peft_model(base, lora)
        self.base: Any = base
        output: Any = base.get_output_embeddings()
        self.head = torch.nn.Linear(output.weight.shape[1], 1, device=output.weight.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.stop_ids, self.pad_id = stop_ids, pad_id
        self._states: Tensor | None = None
        output.register_forward_pre_hook(self._note_states)
        self.model.eval()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head.weight.device

    @property
    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        """What is trained of the model, without the value head."""
        return [p for name, p in self.model.named_parameters() if f".{POLICY}." in name]

    def sample(self, prompts: list[list[int]], *, max_new_tokens: int, seeds: list[int]) -> Texts:
        """A response to each prompt, drawn from the policy as it is; a seed for each."""
        return draw_answers(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            seeds=seeds,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
        )

    def predict(self, texts: Texts, *, with_entropies: bool = True) -> Predicted:
        """Log probability, value and entropy at each response token, [rows, response].

        Not taken from the sampling: its cached arithmetic differs by more than a step of training does.
        Without entropies (zeros then) there is half as much to do on the logits.
        """
        n_response = texts.mask.shape[1]
        # One position earlier each: a token is predicted, and its state valued, before it is there.
        logits = self.model(
            input_ids=texts.tokens,
            attention_mask=texts.attention,
            position_ids=number_positions(texts.attention),
            logits_to_keep=n_response + 1,
            use_cache=False,
        ).logits[:, :-1]
        states, self._states = self._states, None
        assert states is not None
        logprobs, entropies = _read_logits(logits.float(), texts.responses, with_entropies=with_entropies)
        values = self.head(states[:, -n_response - 1 : -1].detach().float()).squeeze(-1)
        return Predicted(logprobs, values * texts.mask, entropies * texts.mask)

    @torch.no_grad()
    def predict_reference(self, texts: Texts) -> Tensor:
        """Log probabilities under the base without the adapter, [rows, response]."""
        with self.model.disable_adapter():
            return self.predict(texts, with_entropies=False).logprobs

    @contextmanager
    def checkpointing(self, wanted: bool) -> Iterator[None]:
        """Within it, activations are computed again in the backward pass instead of being kept."""
        if not wanted:
            yield
            return
        layers = [m for m in self.base.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.base.enable_input_require_grads()  # all that enters the layers is frozen otherwise
        self.base.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers:
            layer.training = True  # of the layer itself, not of the dropout in it
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False
            self.base.gradient_checkpointing_disable()
            self.base.disable_input_require_grads()

    def _note_states(self, _module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self._states = arguments[0].contiguous()  # of the responses alone: else a product for each row
        return (self._states,)


def number_positions(attention: Tensor) -> Tensor:
    """Positions that count from the first token of a text, not from its padding."""
    return (attention.cumsum(1) - 1).clamp(min=0)


def _read_logits(logits: Tensor, tokens: Tensor, *, with_entropies: bool) -> tuple[Tensor, Tensor]:
    """(log probability of each token, entropy without a gradient) from logits [rows, tokens, vocabulary]."""
    # One fused pass over the vocabulary; logsumexp and gather take several, forwards and backwards.
    losses = cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    logprobs = -losses.view(tokens.shape)
    if not with_entropies:
        return logprobs, torch.zeros_like(logprobs)
    with torch.no_grad():
        entropies = logits.logsumexp(-1) - (torch.softmax(logits, -1) * logits).sum(-1)
    return logprobs, entropies
