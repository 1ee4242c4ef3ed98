"""The formats of training rows: how each is recognised, and what it becomes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from trainers.rows.json_values import check_unicode, nearest, wrong_type
from trainers.rows.messages import Message, check_conversation, check_messages, check_prompt, from_sharegpt
from trainers.rows.tool_calls import Tool, check_tools
from trainers.specs.faults import RowFault
from trainers.specs.layouts import PLAIN_TEXT

# What a row is to a method: something said, two answers of which one was preferred, one answer found good or
# bad, plain text, a question.
RowKind = Literal["conversation", "preference", "labelled", "document", "prompt"]


@dataclass(frozen=True)
class Row:
    """A conversation that ends with the assistant. Lines count from 1."""

    line: int
    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)  # that the assistant may call
    # As it was written, for graders.
    item: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Pair:
    """Two answers, each an assistant's message, to one prompt, of which the first was preferred."""

    line: int
    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[Tool] = field(default_factory=list)


@dataclass(frozen=True)
class Labelled:
    """An answer to a prompt, an assistant's message, and whether it is a good one."""

    line: int
    prompt: list[Message]
    completion: Message
    label: bool
    tools: list[Tool] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """Plain text."""

    line: int
    text: str


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user or a tool: the answer is the model's own."""

    line: int
    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    item: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


AnyRow = Row | Pair | Labelled | Document | Prompt


@dataclass(frozen=True)
class Format:
    """One way to write a row. Other keys (ids, sources) are carried by many data sets and passed over."""

    kind: RowKind
    looks: str  # for messages to users
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any], int], AnyRow]
    telling: tuple[str, ...] = ()  # keys of which any makes it this format; the required ones when empty
    unless: Callable[[dict[str, Any]], bool] | None = None  # tells it from another with the same keys

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether the row seems to be meant in this format."""
        if self.unless and self.unless(row):
            return False
        return any(key in row for key in self.telling or self.required)


# Keys that change what a row means: passing over them would train on something else than the user wrote.
UNSUPPORTED = {
    "tools": "tools are not supported here; write the conversation as messages",
    "functions": "functions are not supported; write tools",
    "history": "history is not supported here; write the conversation as messages",
    "system": "a system text is not supported here; write the conversation as messages",
}


def detect_format(row: dict[str, Any]) -> str:
    """Which format a row is written in. Raises ValueError, with the nearest known key, when it is none."""
    for name, known in FORMATS.items():
        if known.matches(row):
            for other in _RICHER[name]:
                refuse_slips(row, other, if_told=True)
            return name
    for key in row:
        if key in UNSUPPORTED:
            raise RowFault("unsupported_key", f"{key!r}: {UNSUPPORTED[key]}")
    required = [key for known in FORMATS.values() for key in known.required]
    for key in row:
        near = nearest(key, required)
        if near:
            raise RowFault("unknown_key", f"unknown key {key!r}; did you mean {near!r}?")
    raise RowFault(
        "unknown_format", f"unknown row; expected {', '.join(known.looks for known in FORMATS.values())}"
    )


def refuse_slips(row: dict[str, Any], known: Format, *, if_told: bool = False) -> None:
    """Raises ValueError where a key that no format has is a slip of one that this format needs.

    if_told: only if, with the key that is meant, the row would tell this format.
    """
    wanted = [key for key in known.telling or known.required if key not in row]
    for key in row:
        near = None if key in _KNOWN_KEYS else nearest(key, wanted)
        if near and (not if_told or known.matches(row | {near: row[key]})):
            raise RowFault("unknown_key", f"unknown key {key!r}; did you mean {near!r}?")


def read_row(row: dict[str, Any], name: str, *, line: int) -> AnyRow:
    """The row as its method will see it. Raises ValueError on what cannot be trained on."""
    known = FORMATS[name]
    _check_keys(row, known)
    found = known.read(row, line)
    return replace(found, item=row) if isinstance(found, Row | Prompt) else found


def _check_keys(row: dict[str, Any], known: Format) -> None:
    names = [*known.required, *known.optional]
    for key, value in row.items():
        if key in names:
            continue
        if key in UNSUPPORTED and value:
            raise RowFault("unsupported_key", f"{key!r}: {UNSUPPORTED[key]}")
        near = nearest(key, [name for name in names if name not in row])
        if near:
            raise RowFault("unknown_key", f"unknown key {key!r}; did you mean {near!r}?")
    for key in known.required:
        if key not in row:
            near = get_close_matches(key, [name for name in row if name not in names], n=1)
            raise RowFault("missing_key", f"{key!r} is missing" + (f"; is it {near[0]!r}?" if near else ""))


def _text(row: dict[str, Any], key: str, *, optional: bool = False) -> str:
    value = row.get(key)
    if optional and value is None:
        return ""
    if key not in row:
        raise RowFault("missing_key", f"{key!r} is missing")
    if not isinstance(value, str):
        raise wrong_type(f"{key!r} must be a text", value)
    if not optional and not value.strip():
        raise RowFault("empty_value", f"{key!r} is empty")
    return check_unicode(value, key)


def _tools(row: dict[str, Any], where: str = "tools") -> list[Tool]:
    parallel = row.get("parallel_tool_calls")  # a setting of OpenAI's API, without a bearing on training
    if not isinstance(parallel, bool | None):
        raise wrong_type("'parallel_tool_calls' must be true or false", parallel)
    return check_tools(row.get("tools"), where)


def _messages(row: dict[str, Any], line: int) -> Row:
    return Row(line, check_conversation(row["messages"]), _tools(row))


def _sharegpt(row: dict[str, Any], line: int) -> Row:
    messages = check_conversation(_with_system(row, from_sharegpt(row["conversations"])), "conversations")
    return Row(line, messages, _tools(row))


def _alpaca(row: dict[str, Any], line: int) -> Row:
    question, context = _text(row, "instruction"), _text(row, "input", optional=True)
    # As MedicalGPT joins them.
    user = f"{question}\n{context}" if context else question
    return Row(line, _dialogue(user, _text(row, "output"), system=_text(row, "system", optional=True)))


def _prompt_completion(row: dict[str, Any], line: int) -> Row:
    return Row(line, _dialogue(_text(row, "prompt"), _text(row, "completion")))


def _dialogue(user: str, assistant: str, *, system: str = "") -> list[Message]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _with_system(row: dict[str, Any], messages: list[Any]) -> list[Any]:
    """The messages after the row's own system text, which some data sets keep beside them."""
    system = _text(row, "system_prompt" if "system_prompt" in row else "system", optional=True)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _question_pair(row: dict[str, Any], line: int) -> Pair:
    """MedicalGPT's form: a question, as below, and two responses."""
    return Pair(line, _asked(row), *_answers(row, "response_chosen", "response_rejected"))


def _asked(row: dict[str, Any]) -> list[Message]:
    """A question after its history of [question, answer] pairs and the row's system text."""
    messages: list[Any] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise wrong_type("'history' must be a list", history)
    for i, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowFault("wrong_type", f"history[{i}] must be a question and its answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages.append({"role": "user", "content": _text(row, "question")})
    return check_prompt(_with_system(row, messages), "history")


def _chosen_rejected(row: dict[str, Any], line: int) -> Pair:
    """A prompt (a text, messages, or ShareGPT turns) and two answers (a text each, or one message each)."""
    if "conversations" in row:
        prompt = check_prompt(_with_system(row, from_sharegpt(row["conversations"])), "conversations")
    elif isinstance(row.get("prompt"), list):
        prompt = check_prompt(row["prompt"], "prompt")
    else:
        prompt = check_prompt(
            _with_system(row, [{"role": "user", "content": _text(row, "prompt")}]), "prompt"
        )
    return Pair(line, prompt, *_answers(row, "chosen", "rejected"), _tools(row))


def _openai_preference(row: dict[str, Any], line: int) -> Pair:
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise RowFault("wrong_type", "'input' must be an object with 'messages'")
    prompt = check_prompt(given["messages"], "input.messages")
    answers = _answers(row, "preferred_output", "non_preferred_output")
    return Pair(line, prompt, *answers, _tools(given, "input.tools"))


def _labelled(row: dict[str, Any], line: int) -> Labelled:
    """TRL's form of unpaired preferences: a prompt (a text or messages), one answer, true or false."""
    if "messages" in row:
        prompt = check_prompt(row["messages"], "messages")
    elif isinstance(row.get("prompt"), list):
        prompt = check_prompt(row["prompt"], "prompt")
    else:
        prompt = check_prompt([{"role": "user", "content": _text(row, "prompt")}], "prompt")
    return Labelled(line, prompt, _answer(row, "completion"), row["label"], _tools(row))


def _is_unlabelled(row: dict[str, Any]) -> bool:
    return "completion" not in row or not isinstance(row.get("label"), bool)


def _answers(row: dict[str, Any], chosen: str, rejected: str) -> tuple[Message, Message]:
    answers = _answer(row, chosen), _answer(row, rejected)
    if answers[0] == answers[1]:
        raise RowFault(
            "same_answers", f"{chosen!r} and {rejected!r} are the same: there is nothing to prefer"
        )
    return answers


def _answer(row: dict[str, Any], key: str) -> Message:
    value = row[key]
    if not isinstance(value, list):
        return {"role": "assistant", "content": _text(row, key)}
    messages = check_messages(value, key)
    if [message["role"] for message in messages] != ["assistant"]:
        raise RowFault("wrong_type", f"{key!r} must be one assistant message")
    return messages[0]


def _question(row: dict[str, Any], line: int) -> Prompt:
    return Prompt(line, _asked(row))


def _prompt(row: dict[str, Any], line: int) -> Prompt:
    """A text, or the messages of a conversation that waits for its answer."""
    if isinstance(row["prompt"], list):
        return Prompt(line, check_prompt(_with_system(row, row["prompt"]), "prompt"), _tools(row))
    user = {"role": "user", "content": _text(row, "prompt")}
    return Prompt(line, check_prompt(_with_system(row, [user]), "prompt"), _tools(row))


def _prompt_messages(row: dict[str, Any], line: int) -> Prompt:
    messages = check_messages(row["messages"])
    answered = messages[-1]["role"] == "assistant"  # rows of both sorts may share a file
    return Prompt(line, check_prompt(messages[:-1] if answered else messages), _tools(row))


def awaits_answer(row: dict[str, Any]) -> bool:
    """Whether the last message of a row is one to answer."""
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") in ("user", "tool")


def _document(row: dict[str, Any], line: int) -> Document:
    return Document(line, _text(row, "text"))


_TOOLS = ("tools", "parallel_tool_calls")
# In the order in which they are tried: the keys of a later one may appear in an earlier one.
FORMATS: dict[str, Format] = {
    "openai_preference": Format(
        "preference",
        '{"input": {"messages"}, "preferred_output", "non_preferred_output"}',
        ("input", "preferred_output", "non_preferred_output"),
        (),
        _openai_preference,
        telling=("preferred_output", "non_preferred_output"),
    ),
    "question_preference": Format(
        "preference",
        '{"question", "response_chosen", "response_rejected"}',
        ("question", "response_chosen", "response_rejected"),
        ("system", "system_prompt", "history"),
        _question_pair,
        telling=("response_chosen", "response_rejected"),
    ),
    "preference": Format(
        "preference",
        '{"prompt", "chosen", "rejected"}',
        ("chosen", "rejected"),
        ("prompt", "conversations", "system", "system_prompt", *_TOOLS),
        _chosen_rejected,
    ),
    # A label of another type is some column that conversations carry along.
    "labelled": Format(
        "labelled",
        '{"prompt", "completion", "label": true or false}',
        ("completion", "label"),
        ("prompt", "messages", *_TOOLS),
        _labelled,
        unless=_is_unlabelled,
    ),
    "messages": Format(
        "conversation", '{"messages": [...]}', ("messages",), _TOOLS, _messages, unless=awaits_answer
    ),
    "prompt_messages": Format(
        "prompt", '{"messages": [..., a question]}', ("messages",), _TOOLS, _prompt_messages
    ),
    "sharegpt": Format(
        "conversation",
        '{"conversations": [...]}',
        ("conversations",),
        ("system", "system_prompt", *_TOOLS),
        _sharegpt,
    ),
    "alpaca": Format(
        "conversation",
        '{"instruction", "input", "output"}',
        ("instruction", "output"),
        ("input", "system"),
        _alpaca,
    ),
    "prompt_completion": Format(
        "conversation",
        '{"prompt", "completion"}',
        ("prompt", "completion"),
        (),
        _prompt_completion,
        telling=("completion",),
    ),
    "question": Format(
        "prompt", '{"question"}', ("question",), ("system", "system_prompt", "history"), _question
    ),
    "prompt": Format("prompt", '{"prompt"}', ("prompt",), ("system", "system_prompt", *_TOOLS), _prompt),
    "text": Format("document", '{"text"}', ("text",), (), _document),
}
_KNOWN_KEYS = frozenset(key for known in FORMATS.values() for key in (*known.required, *known.optional))
# Of each format, those that have what it needs and more: with a slip in what is more, they look like it.
_RICHER = {
    name: [
        other
        for other in list(FORMATS.values())[:place]
        if {*known.required} <= {*other.required, *other.optional}
    ]
    for place, (name, known) in enumerate(FORMATS.items())
}


def kind_of(name: str) -> RowKind:
    """What rows of the format `name` are to a method."""
    return "document" if name == PLAIN_TEXT else FORMATS[name].kind
