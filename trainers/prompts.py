"""Prompts to token ids, each up to the point where the model's answer begins."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig

from trainers.examples import Example
from trainers.exits import DataError
from trainers.messages import Message
from trainers.row_formats import Prompt, Row
from trainers.specs.graders import MissingItem, load_grader, read_items


class PromptEncoder:
    """A prompt of more than max_length tokens is left out: half a question deserves no answer.

    Conversations serve as well: what comes before their last answer is the prompt. The messages are kept
    beside the tokens, as bytes of JSON, for a reward model that has a template of its own; so is what a
    grader reads of the row.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, grader: dict[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._grader = load_grader(grader) if grader else None
        self.columns = ("prompt_ids", "message_bytes", *(["item_bytes"] if grader else []))

    def encode(self, rows: list[Prompt | Row]) -> Iterator[Example]:
        """One example a row, in order. Raises DataError, naming the line, if template or grader refuse it."""
        for row in rows:
            messages = plain_prompt(row)
            try:
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            except (TemplateError, TypeError) as error:
                raise DataError(
                    f"line {row.line}: the model's chat template refuses this conversation: {error}"
                ) from error
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            fits = len(ids) <= self._max_length
            columns = {"prompt_ids": ids, "message_bytes": _to_bytes(messages)}
            if self._grader:
                columns["item_bytes"] = _to_bytes(self._read_items(row))
            yield Example(
                row.line,
                columns,
                n_tokens=len(ids),
                n_trainable=len(ids) if fits else 0,
                full_length=len(ids),
            )

    def _read_items(self, row: Prompt | Row) -> dict[str, str]:
        assert self._grader
        try:
            return read_items(row.item, self._grader)
        except MissingItem as error:
            raise DataError(f"line {row.line}: {error}") from error

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


def plain_prompt(row: Prompt | Row) -> list[Message]:
    """The messages up to the last of the user's."""
    messages = row.messages if isinstance(row, Prompt) else row.messages[:-1]
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def read_messages(message_bytes: list[int]) -> list[Message]:
    """The messages of a prepared row."""
    return json.loads(bytes(message_bytes))


def load_items(item_bytes: list[int]) -> dict[str, str]:
    """What the grader reads of a prepared row."""
    return json.loads(bytes(item_bytes))


def _to_bytes(value: Any) -> list[int]:
    return list(json.dumps(value).encode())
