"""Preferences to token ids: a prompt and two answers, each ended as the chat template ends a turn."""

from collections.abc import Iterator
from typing import Any

from trainers.folders.exits import DataError
from trainers.rows.formats import Pair, Row
from trainers.rows.messages import Message
from trainers.tokens.conversations import IGNORED, ConversationEncoder
from trainers.tokens.examples import Example


class PairEncoder:
    """A pair of which one text is longer than max_length is left out: half an answer says nothing."""

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")

    def __init__(self, tokenizer: Any, *, stop_ids: frozenset[int], max_length: int) -> None:
        self._max_length = max_length
        self._encoder = ConversationEncoder(tokenizer, stop_ids=stop_ids, max_length=2**31)

    def encode(self, rows: list[Pair]) -> Iterator[Example]:
        """One example a pair, in order. Raises DataError, naming the line."""
        texts = [
            Row(pair.line, with_answer(pair.prompt, answer), pair.tools)
            for pair in rows
            for answer in (pair.chosen, pair.rejected)
        ]
        encoded = self._encoder.encode(texts)
        for pair in rows:
            yield self._join(pair.line, next(encoded), next(encoded))

    def finish(self) -> Iterator[Example]:
        """Nothing is held back."""
        return iter(())

    def _join(self, line: int, chosen: Example, rejected: Example) -> Example:
        prompt, good = split_answer(chosen)
        other_prompt, bad = split_answer(rejected)
        if prompt != other_prompt:
            raise DataError(
                f"line {line}: the chat template writes the prompt differently for the two answers"
            )
        longest = len(prompt) + max(len(good), len(bad))
        fits = longest <= self._max_length
        return Example(
            line,
            {"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad},
            n_tokens=2 * len(prompt) + len(good) + len(bad),
            n_trainable=len(good) + len(bad) if fits else 0,
            full_length=longest,
        )


def with_answer(prompt: list[Message], answer: Message) -> list[Message]:
    """The conversation with the answer at its end, which alone is looked for."""
    earlier = [message | ({"weight": 0} if message["role"] == "assistant" else {}) for message in prompt]
    return [*earlier, answer | {"weight": 1}]


def split_answer(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before the answer, and the answer with its end of turn."""
    trained = [i for i, label in enumerate(example.labels) if label != IGNORED]
    start, end = trained[0], trained[-1] + 1
    return example.input_ids[:start], example.input_ids[start:end]
