"""Prompts to token ids, each up to the point where the model's answer begins."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from trainers.folders.exits import DataError
from trainers.rows.formats import Prompt, Row
from trainers.specs.graders import MissingItem, load_grader, read_items
from trainers.tokens.conversations import naming_line
from trainers.tokens.examples import Example
from trainers.tokens.rendering import check_tools_are_written, drop_weights, render


class PromptEncoder:
    """A prompt of more than max_length tokens is left out: half a question deserves no answer.

    Conversations serve as well: what comes before their last answer is the prompt. It is kept as it was
    written beside the tokens, as bytes of JSON, for a reward model that has a template of its own, and with
    it what the grader reads of the row.
    """

    columns = ("prompt_ids", "prompt_bytes")

    def __init__(self, tokenizer: Any, *, max_length: int, grader: dict[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._grader = load_grader(grader) if grader else None

    def encode(self, rows: list[Prompt | Row]) -> Iterator[Example]:
        """One example a row, in order. Raises DataError, naming the line, if template or grader refuse it."""
        for row in rows:
            with naming_line(row.line):
                prompt = cut_prompt(row, items=self._read_items(row))
                check_tools_are_written(self._tokenizer, prompt.messages, prompt.tools)
                text = render(self._tokenizer, prompt.messages, prompt.tools, add_generation_prompt=True)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            fits = len(ids) <= self._max_length
            yield Example(
                row.line,
                {"prompt_ids": ids, "prompt_bytes": list(json.dumps(vars(prompt)).encode())},
                n_tokens=len(ids),
                n_trainable=len(ids) if fits else 0,
                full_length=len(ids),
            )

    def _read_items(self, row: Prompt | Row) -> dict[str, str]:
        if self._grader is None:
            return {}
        try:
            return read_items(row.item, self._grader)
        except MissingItem as error:
            raise DataError(str(error)) from error

    def finish(self) -> Iterator[Example]:
        """Nothing is held back."""
        return iter(())


def check_room(files: list[Any], *, model_dir: Path, output_max_length: int) -> None:
    """Raises DataError where the longest prompt of the prepared files leaves no room for an answer."""
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(ids) for rows in files for ids in rows["prompt_ids"])
    if limit and longest + output_max_length > limit:
        raise DataError(
            f"the longest prompt has {longest} tokens, and with an answer of {output_max_length} "
            f"(output_max_length) it does not fit into the model's {limit} positions: "
            "lower output_max_length, or max_length to leave out such prompts"
        )


def cut_prompt(row: Prompt | Row, *, items: dict[str, str]) -> Prompt:
    """What comes before the last answer, with the `items` of the row that are to be kept."""
    messages = row.messages if isinstance(row, Prompt) else row.messages[:-1]
    return Prompt(row.line, drop_weights(messages), row.tools, items)


def read_prompt(prompt_bytes: list[int]) -> Prompt:
    """The prompt of a prepared row."""
    return Prompt(**json.loads(bytes(prompt_bytes)))
