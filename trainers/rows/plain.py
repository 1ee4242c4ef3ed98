"""The usual rows, known to be good at the speed of a typed decoder; whatever is unusual is left to be read.

A `PlainCheck` may only say yes to what `row_formats.read_row` takes as a row of the same format: a test holds
the two together. It says no whenever it is in doubt, and of what there is a notice of.
"""

import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Annotated, Any, Literal, TypeGuard

import msgspec

from trainers.rows.messages import MANY_CHARS, MANY_TURNS

_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Few = msgspec.Meta(max_length=MANY_TURNS)
_first_byte, _last_byte = itemgetter(0), itemgetter(-1)


class _Known(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Keys that the format has, and no others: another may be a slip of one that is optional."""


class _Message(_Known):
    role: Literal["system", "user", "assistant"]
    content: _Text


class _Turn(_Known):
    speaker: Literal["system", "human", "gpt", "user", "assistant"] = msgspec.field(name="from")
    value: _Text


class _Messages(_Known):
    messages: Annotated[list[_Message], _Few]


class _ShareGPT(_Known):
    conversations: Annotated[list[_Turn], _Few]


class _Alpaca(_Known):
    instruction: _Text
    output: _Text
    input: str = ""
    system: str = ""


class _PromptCompletion(_Known):
    prompt: _Text
    completion: _Text


class _Preference(_Known):
    prompt: _Text
    chosen: _Text
    rejected: _Text


class _QuestionPreference(_Known):
    question: _Text
    response_chosen: _Text
    response_rejected: _Text


class _Question(_Known):
    question: _Text


class _Prompt(_Known):
    prompt: _Text


class _Document(_Known):
    text: _Text


_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


# A system text at most, then user and assistant in turn up to the last answer, none of them blank.


def _check_messages(row: Any) -> bool:
    messages = row.messages
    role = "assistant"
    for one in messages:
        said = one.role
        if said == role or one.content.isspace():
            return False
        if (said == "system" and one is not messages[0]) or (role == "system" and said != "user"):
            return False
        role = said
    return role == "assistant" and bool(messages)


def _check_sharegpt(row: Any) -> bool:
    turns = row.conversations
    role = "assistant"
    for one in turns:
        said = _ROLES[one.speaker]
        if said == role or one.value.isspace():
            return False
        if (said == "system" and one is not turns[0]) or (role == "system" and said != "user"):
            return False
        role = said
    return role == "assistant" and bool(turns)


def _check_texts(*names: str) -> Callable[[Any], bool]:
    return lambda row: not any(getattr(row, name).isspace() for name in names)


def _check_answers(chosen: str, rejected: str, asked: str) -> Callable[[Any], bool]:
    says_something = _check_texts(chosen, rejected, asked)
    return lambda row: getattr(row, chosen) != getattr(row, rejected) and says_something(row)


_CHECKS: dict[str, tuple[type[_Known], Callable[[Any], bool]]] = {
    "messages": (_Messages, _check_messages),
    "sharegpt": (_ShareGPT, _check_sharegpt),
    "alpaca": (_Alpaca, _check_texts("instruction", "output", "system")),
    "prompt_completion": (_PromptCompletion, _check_texts("prompt", "completion")),
    "preference": (_Preference, _check_answers("chosen", "rejected", "prompt")),
    "question_preference": (
        _QuestionPreference,
        _check_answers("response_chosen", "response_rejected", "question"),
    ),
    "question": (_Question, _check_texts("question")),
    "prompt": (_Prompt, _check_texts("prompt")),
    "text": (_Document, _check_texts("text")),
}


class PlainCheck:
    """Tells whether lines of JSON are certainly good rows of one format."""

    def __init__(self, shape: type[_Known], check: Callable[[Any], bool]) -> None:
        decoder = msgspec.json.Decoder(shape)
        self._decode, self._decode_lines, self._check = decoder.decode, decoder.decode_lines, check
        # No text has more characters than its line has bytes. Documents are cut into blocks at any length.
        self._n_bytes = sys.maxsize if shape is _Document else MANY_CHARS

    def takes(self, line: bytes) -> bool:
        """Whether a line is such a row."""
        try:
            row = self._decode(line)
            return self._check(row) and (len(line) <= self._n_bytes or not _is_over_long(row))
        except (msgspec.DecodeError, UnicodeDecodeError):  # a ValidationError is a DecodeError
            return False

    def takes_all(self, lines: Sequence[Any], *, data: bytes) -> TypeGuard[list[bytes]]:
        """Whether each of these lines, which `data` is made of, is such a row: faster than one by one."""
        # Lines that all begin and end as objects do hold whole objects, for what goes on after an inner one's
        # end does not begin like that; as many objects as lines are then one a line.
        if not data or not _look_like_objects(lines):
            return False
        try:
            rows = self._decode_lines(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        if len(rows) != len(lines) or not all(map(self._check, rows)):
            return False
        return max(map(len, lines)) <= self._n_bytes or not any(map(_is_over_long, rows))


def _is_over_long(row: _Known) -> bool:
    """Whether its texts and the contents of its turns have many characters."""
    n_chars = 0
    for value in msgspec.structs.astuple(row):
        texts = [value] if isinstance(value, str) else [msgspec.structs.astuple(turn)[1] for turn in value]
        n_chars += sum(map(len, texts))
    return n_chars >= MANY_CHARS  # where texts are joined, one more stands between them


def _look_like_objects(lines: Sequence[bytes]) -> bool:
    """Whether each begins and ends as a JSON object does; said without a step of Python for each."""
    if not all(lines) or set(map(_first_byte, lines)) != {ord("{")}:
        return False
    ends = set(map(_last_byte, lines))
    return ends == {ord("}")} or (
        ends <= set(b"}\r") and all(line.endswith((b"}", b"}\r")) for line in lines)
    )


def make_check(format_: str) -> PlainCheck | None:
    """The check of a format; None for one that has none."""
    found = _CHECKS.get(format_)
    return PlainCheck(*found) if found else None
