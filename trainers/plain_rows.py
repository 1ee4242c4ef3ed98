"""The usual rows, known to be good at the speed of a typed decoder; whatever is unusual is left to be read.

`is_plain` may only say yes to what `row_formats.read_row` takes as a row of the same format: a test holds the
two together. It says no whenever it is in doubt.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec

IsPlain = Callable[[bytes], bool]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _Known(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Keys that the format has, and no others: another may be a slip of one that is optional."""


class _Message(_Known):
    role: Literal["system", "user", "assistant"]
    content: _Text


class _Turn(_Known):
    speaker: Literal["system", "human", "gpt", "user", "assistant"] = msgspec.field(name="from")
    value: _Text


class _Messages(_Known):
    messages: list[_Message]


class _ShareGPT(_Known):
    conversations: list[_Turn]


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


def _take_turns(roles: Sequence[str], texts: Sequence[str]) -> bool:
    """A system text at most, then user and assistant in turn up to the last answer, none of them empty."""
    first = 1 if roles and roles[0] == "system" else 0
    rest = len(roles) - first
    if rest == 0 or rest % 2:
        return False
    for i in range(first, len(roles), 2):
        if roles[i] != "user" or roles[i + 1] != "assistant":
            return False
    return not any(map(str.isspace, texts))


def _check_messages(row: Any) -> bool:
    said = row.messages
    return _take_turns([one.role for one in said], [one.content for one in said])


def _check_sharegpt(row: Any) -> bool:
    said = row.conversations
    return _take_turns([_ROLES[one.speaker] for one in said], [one.value for one in said])


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


def make_check(format_: str) -> IsPlain | None:
    """Tells whether a line of JSON is certainly a good row of this format; None where none can be told so."""
    found = _CHECKS.get(format_)
    if found is None:
        return None
    decode, check = msgspec.json.Decoder(found[0]).decode, found[1]

    def is_plain(line: bytes) -> bool:
        try:
            return check(decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):  # a ValidationError is a DecodeError
            return False

    return is_plain
