"""Conversations to token ids and labels: the model's own chat template, loss on the assistant's turns."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from trainers.folders.exits import DataError
from trainers.rows.formats import Row
from trainers.tokens.examples import Example
from trainers.tokens.rendering import check_tools_are_written, drop_weights, render, to_template

IGNORED = -100  # the label of a token without loss
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]  # token positions [start, end)
Offsets = Sequence[tuple[int, int]]  # characters [start, end) of each token


def load_tokenizer(model_dir: Path, *, for_chat: bool = True) -> PreTrainedTokenizerBase:
    """The model's tokenizer: a fast one, and for conversations with a chat template. Raises DataError."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise DataError("the model's tokenizer is not a fast one (tokenizer.json is missing)")
    if for_chat and not tokenizer.chat_template:
        raise DataError(
            "the model has no chat template, so conversations cannot be written the way it reads them; "
            "name one in chat_template, train an instruct model, or import it with a chat_template.jinja"
        )
    return tokenizer


def find_stop_ids(tokenizer: PreTrainedTokenizerBase, model_dir: Path) -> frozenset[int]:
    """Tokens that may end a turn: the special ones and whatever generation stops at."""
    ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids |= set(tokenizer.all_special_ids)
    if (model_dir / "generation_config.json").is_file():
        stops = GenerationConfig.from_pretrained(model_dir).eos_token_id
        ids |= set(stops if isinstance(stops, list) else [] if stops is None else [stops])
    return frozenset(ids)


def make_example(line: int, input_ids: list[int], labels: list[int], full_length: int) -> Example:
    """An example of token ids and their labels."""
    return Example(
        line,
        {"input_ids": input_ids, "labels": labels},
        n_tokens=len(input_ids),
        # A causal model predicts a token from those before it, so the first one is never predicted.
        n_trainable=sum(label != IGNORED for label in labels[1:]),
        full_length=full_length,
        was_cut=full_length > len(input_ids),
    )


class ConversationEncoder:
    """Turns rows into examples of at most max_length tokens; the beginning of a longer one is kept."""

    columns = ("input_ids", "labels")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: frozenset[int],
        max_length: int,
        train_on_inputs: bool = False,
    ):
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._max_length = max_length
        self._train_on_inputs = train_on_inputs

    def encode(self, rows: list[Row]) -> Iterator[Example]:
        """One example a row, in order. Raises DataError, naming the line, where the template does not fit."""
        texts = []
        for row in rows:
            with naming_line(row.line):
                check_tools_are_written(self._tokenizer, row.messages, row.tools)
                texts.append(render(self._tokenizer, row.messages, row.tools))
        # No special tokens: the template has written its own, a second BOS would be one too many.
        encoded: Any = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for i, row in enumerate(rows):
            ids = encoded["input_ids"][i]
            labels = ids
            if not self._train_on_inputs:
                with naming_line(row.line):
                    spans = self._find_spans(row, texts[i], ids, encoded["offset_mapping"][i])
                labels = [IGNORED] * len(ids)
                for start, end in spans:
                    labels[start:end] = ids[start:end]
            yield make_example(row.line, ids[: self._max_length], labels[: self._max_length], len(ids))

    def finish(self) -> Iterator[Example]:
        """Nothing is held back."""
        return iter(())

    def _find_spans(self, row: Row, text: str, ids: list[int], offsets: Offsets) -> list[Span]:
        """The tokens of each assistant turn with weight, its calls and its end-of-turn token included."""
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        # Some models have a template of their own for conversations with tools.
        if _GENERATION_TAG.search(self._tokenizer.get_chat_template(tools=to_template(row.tools))):
            spans = self._marked_spans(row, ids)
            if len(spans) != len(turns):
                raise DataError(
                    f"the chat template marks {len(spans)} assistant turns in a row that has {len(turns)}"
                )
        else:
            spans = self._rendered_spans(row, turns, text, ids, offsets)
        for (start, end), i in zip(spans, turns, strict=True):
            said = text[offsets[start][0] : offsets[end - 1][1]]
            if any(call["function"]["name"] not in said for call in row.messages[i].get("tool_calls", [])):
                raise DataError(
                    "the chat template ends an assistant turn before its calls: they have no loss"
                )
        return [span for span, i in zip(spans, turns, strict=True) if row.messages[i].get("weight", 1)]

    def _marked_spans(self, row: Row, ids: list[int]) -> list[Span]:
        """Turns as the template's own {% generation %} marks give them."""
        marked: Any = self._tokenizer.apply_chat_template(
            drop_weights(row.messages),
            tools=to_template(row.tools),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        if list(marked["input_ids"]) != ids:
            raise DataError("the chat template renders this conversation differently each time")
        spans = []
        for start, end in _runs(marked["assistant_masks"]):
            # Some templates close the mark before the end-of-turn token; untrained, the model never stops.
            end = self._end_of_turn(ids, start, end)
            if end is None:
                raise DataError("the chat template does not end an assistant turn with a special token")
            spans.append((start, end))
        return spans

    def _rendered_spans(
        self, row: Row, turns: list[int], text: str, ids: list[int], offsets: Offsets
    ) -> list[Span]:
        """Turns found by rendering the conversation up to each of them and comparing with the whole.

        Templates may rewrite history (drop the reasoning of earlier turns) or end the last turn in
        another way, so nothing is subtracted: what goes before a turn must be there unchanged, and
        where a turn's end differs it is looked for among the special tokens.
        """
        starts = []
        for i in turns:
            before = render(self._tokenizer, row.messages[:i], row.tools, add_generation_prompt=True)
            if not text.startswith(before):
                raise DataError(
                    "the chat template renders the text before an assistant turn differently "
                    "once the turn is there, so its tokens cannot be told from the prompt's"
                )
            starts.append(_first_token_after(offsets, len(before)))
        last_end = self._end_of_turn(ids, starts[-1], len(ids))
        if last_end is None:
            raise DataError(
                "the chat template does not end an assistant turn with a special token: "
                "the model would never learn to stop"
            )
        spans = []
        for n, i in enumerate(turns[:-1]):
            so_far = render(self._tokenizer, row.messages[: i + 1], row.tools)
            shared = _shared_length(text, so_far)
            end = self._end_of_turn(ids, starts[n], _last_token_before(offsets, shared))
            if end is None:  # the turn was rewritten: it ends as the last one does
                stop = ids[last_end - 1]
                end = next((k + 1 for k in range(starts[n], starts[n + 1]) if ids[k] == stop), None)
            if end is None or end > starts[n + 1]:
                raise DataError("the chat template does not end every assistant turn with a special token")
            spans.append((starts[n], end))
        return [*spans, (starts[-1], last_end)]

    def _end_of_turn(self, ids: list[int], start: int, end: int) -> int | None:
        """Where the turn in ids[start:end] ends, white space after its last special token left out.

        The token after the span counts when the span itself ends with plain text. None: no such token.
        """
        while end > start and ids[end - 1] not in self._stop_ids and self._is_space(ids[end - 1]):
            end -= 1
        if end <= start:
            return None
        if ids[end - 1] in self._stop_ids:
            return end
        return end + 1 if end < len(ids) and ids[end] in self._stop_ids else None

    def _is_space(self, token_id: int) -> bool:
        return not str(self._tokenizer.decode([token_id])).strip()


@contextmanager
def naming_line(line: int) -> Iterator[None]:
    """Puts the line of the training file in front of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"line {line}: {error}", line=line) from error


def _shared_length(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _runs(mask: list[int]) -> list[Span]:
    """The stretches of ones."""
    padded = [0, *mask, 0]
    edges = [i for i in range(len(mask) + 1) if padded[i] != padded[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _first_token_after(offsets: Offsets, char: int) -> int:
    """The first token that lies wholly after a character position; one that straddles it belongs before."""
    position = bisect_left(offsets, char, key=lambda offset: offset[0])
    while position < len(offsets) and offsets[position][1] <= char:
        position += 1  # a token of no width, such as white space the tokenizer trims from its offsets
    return position


def _last_token_before(offsets: Offsets, char: int) -> int:
    """One past the last token that lies wholly before a character position."""
    position = bisect_left(offsets, char, key=lambda offset: offset[0])
    while position > 0 and offsets[position - 1][1] > char:
        position -= 1
    return position
