"""Answers found good or bad to token ids. A pair is two: the chosen one is good, the rejected one bad."""

from collections.abc import Iterator
from typing import Any

from trainers.rows.formats import Labelled, Pair, Row
from trainers.tokens.conversations import ConversationEncoder
from trainers.tokens.examples import Example
from trainers.tokens.pairs import split_answer, with_answer


class LabelledEncoder:
    """An answer that makes the text longer than max_length is left out: half of it says nothing."""

    columns = ("prompt_ids", "completion_ids", "label")

    def __init__(self, tokenizer: Any, *, stop_ids: frozenset[int], max_length: int) -> None:
        self._max_length = max_length
        self._encoder = ConversationEncoder(tokenizer, stop_ids=stop_ids, max_length=2**31)

    def encode(self, rows: list[Labelled | Pair]) -> Iterator[Example]:
        """One example an answer, in order. Raises DataError, naming the line."""
        answers = [answer for row in rows for answer in _unpair(row)]
        texts = [
            Row(answer.line, with_answer(answer.prompt, answer.completion), answer.tools)
            for answer in answers
        ]
        for answer, encoded in zip(answers, self._encoder.encode(texts), strict=True):
            prompt, completion = split_answer(encoded)
            length = len(prompt) + len(completion)
            yield Example(
                answer.line,
                {"prompt_ids": prompt, "completion_ids": completion, "label": [int(answer.label)]},
                n_tokens=length,
                n_trainable=len(completion) if length <= self._max_length else 0,
                full_length=length,
            )

    def finish(self) -> Iterator[Example]:
        """Nothing is held back."""
        return iter(())


def _unpair(row: Labelled | Pair) -> list[Labelled]:
    if isinstance(row, Labelled):
        return [row]
    return [
        Labelled(row.line, row.prompt, row.chosen, True, row.tools),
        Labelled(row.line, row.prompt, row.rejected, False, row.tools),
    ]
