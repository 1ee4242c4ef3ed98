"""Reward models that score answers: what they are asked, and one that stands beside the model it judges."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainers.folders.exits import DataError
from trainers.models.adapters import TRAINED_HEAD_KEY, find_stop_ids, load_model
from trainers.rows.formats import Prompt
from trainers.specs import RunSpec, SpecError
from trainers.tokens.conversations import load_tokenizer
from trainers.tokens.rendering import check_tools_are_written, render
from trainers.training.draws import Texts


class Scorer(Protocol):
    """Gives each response a number: the higher, the better it is liked."""

    where: str  # the reward model is

    def score(self, texts: Texts, prompts: list[Prompt]) -> Tensor:
        """[rows] scores of the responses to `prompts`, as they were written."""
        ...


class ScorerBeside:
    """A reward model on another base: it reads the decoded text, in its own template and tokens."""

    where = "a model beside the policy"

    def __init__(self, model_dir: Path, *, tokenizer: Any, device: torch.device, dtype: torch.dtype):
        self._policy_tokenizer = tokenizer
        self._model = load_model(model_dir, dtype=dtype, head="score").to(device)
        self._model.requires_grad_(False)
        self._tokenizer: Any = load_tokenizer(model_dir)
        self._stop_ids = find_stop_ids(self._tokenizer, self._model.config.eos_token_id)
        self._pad_id = int(self._model.config.pad_token_id)

    def score(self, texts: Texts, prompts: list[Prompt]) -> Tensor:
        """[rows] scores, each read at the last token of its text."""
        answers = [
            self._policy_tokenizer.decode(tokens[mask], skip_special_tokens=True)
            for tokens, mask in zip(texts.responses, texts.mask, strict=True)
        ]
        return self.score_answers(prompts, answers, ended=texts.ended.tolist())

    @torch.no_grad()
    def score_answers(self, prompts: list[Prompt], answers: list[str], *, ended: list[bool]) -> Tensor:
        """[rows] scores of answers to `prompts`; ended: whether each came to its end by itself."""
        rows = [
            self._encode(prompt, answer, ended=whole)
            for prompt, answer, whole in zip(prompts, answers, ended, strict=True)
        ]
        longest = max(map(len, rows))
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if limit and longest > limit:
            raise DataError(
                f"a question and its answer come to {longest} tokens of the reward model, "
                f"which has {limit} positions: lower output_max_length or max_length"
            )
        ids = torch.tensor([row + [self._pad_id] * (longest - len(row)) for row in rows])
        attention = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = self._model.device
        logits = self._model(input_ids=ids.to(device), attention_mask=attention.to(device)).logits
        return logits.float().squeeze(-1)

    def _encode(self, prompt: Prompt, response: str, *, ended: bool) -> list[int]:
        """Token ids up to the end of the answer's turn; a turn that was cut short is not closed."""
        try:
            check_tools_are_written(self._tokenizer, prompt.messages, prompt.tools)
        except DataError as error:
            raise DataError(
                f"line {prompt.line}: the reward model has a template of its own: {error}"
            ) from error
        answered = [*prompt.messages, {"role": "assistant", "content": response}]
        text = render(self._tokenizer, answered, prompt.tools)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        end = next((i for i in reversed(range(len(ids))) if ids[i] in self._stop_ids), len(ids))
        return ids[: end + ended]


def require_head(spec: RunSpec) -> tuple[Path, dict[str, Any]]:
    """(folder of the job's reward model, its configuration). Raises SpecError when it has no trained head."""
    if spec.reward_model_dir is None:
        raise refuse_judge("none was given", method=spec.method)
    config = json.loads((spec.reward_model_dir / "config.json").read_bytes())
    if config.get(TRAINED_HEAD_KEY) is not True:
        raise refuse_judge(
            "it is no reward model: it has no trained head, and a random one rewards noise",
            method=spec.method,
        )
    return spec.reward_model_dir, config


def refuse_judge(problem: str, *, method: str) -> SpecError:
    """What is wrong with the reward model of a job."""
    return SpecError(
        f"the reward model cannot be used: {problem}",
        param=f"method.{method}.hyperparameters.reward_model",
    )
