"""Training rows as users write them, one JSON object a line, and the chat messages they become."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, Literal

MAX_LINE_BYTES = 16 << 20

RowFormat = Literal["messages", "alpaca", "prompt_completion"]
Message = dict[str, Any]  # role and content, and weight where it was given

# What each format must and may have. Other keys are carried by many data sets (ids, sources) and ignored.
REQUIRED: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
OPTIONAL: dict[RowFormat, tuple[str, ...]] = {"messages": (), "alpaca": ("input",), "prompt_completion": ()}
# Keys that change what a row means: passing over them would train on something else than the user wrote.
UNSUPPORTED = {
    "tools": "tools are not supported yet",
    "functions": "functions are not supported yet",
    "conversations": "ShareGPT rows are not supported yet; write them as messages",
    "chosen": "this is a preference row, which the supervised method cannot use",
    "rejected": "this is a preference row, which the supervised method cannot use",
    "preferred_output": "this is a preference row, which the supervised method cannot use",
    "history": "history is not supported; write the conversation as messages",
    "system": "a system text is not supported here; write the conversation as messages",
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_KEYS = ("role", "content", "weight", "name")
_FORMAT_NAMES = {
    "messages": '{"messages": [...]}',
    "alpaca": '{"instruction", "input", "output"}',
    "prompt_completion": '{"prompt", "completion"}',
}


@dataclass(frozen=True)
class Row:
    line: int  # 1-based
    messages: list[Message]


@dataclass(frozen=True)
class RowError:
    line: int
    message: str


class Rows:
    """Reads a file row by row, in bounded memory: each item is a Row or the RowError of that line.

    The first valid row decides the format of the file. Counts are complete once the iteration has ended.
    """

    def __init__(self, path: Path):
        self._path = path
        self.format: RowFormat | None = None
        self.n_rows = 0  # lines that hold something, valid or not
        self.blank_lines = 0

    def __iter__(self) -> Iterator[Row | RowError]:
        with self._path.open("rb") as file:
            for line, data in _split_lines(file):
                if data is not None and not data.strip():
                    self.blank_lines += 1
                    continue
                self.n_rows += 1
                try:
                    yield Row(line, self._read(data, line=line))
                except ValueError as error:
                    yield RowError(line, str(error))
                    if line == 1 and data is not None and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
                        return  # UTF-16: every further line would repeat the complaint
        if self.n_rows == 0:
            yield RowError(1, "the file holds no rows" if self.blank_lines else "the file is empty")

    def _read(self, data: bytes | None, *, line: int) -> list[Message]:
        row = _parse_line(data, first=line == 1)
        kind = detect_format(row)
        if self.format and kind != self.format:
            raise ValueError(
                f"this row is {_FORMAT_NAMES[kind]}, but the rows before it are {_FORMAT_NAMES[self.format]}"
            )
        messages = to_messages(row, kind)
        self.format = kind
        return messages


def _split_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(1-based number, bytes) of each line; None for one that is too long to be held in memory."""
    line = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(data) <= MAX_LINE_BYTES:
            yield line, data
            continue
        while data and not data.endswith(b"\n"):
            data = file.readline(MAX_LINE_BYTES)
        yield line, None


def _parse_line(data: bytes | None, *, first: bool) -> dict[str, Any]:
    if data is None:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    if first and data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("the file starts with a byte order mark; save it as UTF-8 without one")
    if first and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("the file is UTF-16; save it as UTF-8")
    if b"\0" in data:
        raise ValueError("the line holds a NUL byte")
    try:
        row = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        hint = "; JSONL has one whole object a line" if first and data.lstrip()[:1] in (b"[", b"{") else ""
        raise ValueError(f"the line is not JSON: {error.msg} at character {error.pos + 1}{hint}") from None
    except (RecursionError, ValueError):
        raise ValueError("the line is not JSON that can be read: too deep, or a number too long") from None
    if isinstance(row, list):
        raise ValueError("the line is a JSON array; JSONL has one object a line")
    if not isinstance(row, dict):
        raise ValueError("the line is not a JSON object")
    return row


def detect_format(row: dict[str, Any]) -> RowFormat:
    """Which format a row is written in. Raises ValueError, with the nearest known key, when it is none."""
    for kind, keys in REQUIRED.items():
        if any(key in row for key in keys):
            return kind
    for key in row:
        if key in UNSUPPORTED:
            raise ValueError(f"{key!r}: {UNSUPPORTED[key]}")
    required = [key for keys in REQUIRED.values() for key in keys]
    for key in row:
        near = _nearest(key, required)
        if near:
            raise ValueError(f"unknown key {key!r}; did you mean {near!r}?")
    raise ValueError(f"unknown row; expected {', '.join(_FORMAT_NAMES.values())}")


def to_messages(row: dict[str, Any], kind: RowFormat) -> list[Message]:
    """The row as a conversation ending with the assistant. Raises ValueError on what cannot be trained on."""
    _check_keys(row, kind)
    if kind == "messages":
        return _check_messages(row["messages"])
    if kind == "alpaca":
        question = _text(row, "instruction")
        context = _text(row, "input", optional=True)
        # As MedicalGPT joins them.
        user = f"{question}\n{context}" if context else question
        return [{"role": "user", "content": user}, {"role": "assistant", "content": _text(row, "output")}]
    return [
        {"role": "user", "content": _text(row, "prompt")},
        {"role": "assistant", "content": _text(row, "completion")},
    ]


def _check_keys(row: dict[str, Any], kind: RowFormat) -> None:
    known = [*REQUIRED[kind], *OPTIONAL[kind]]
    for key, value in row.items():
        if key in known:
            continue
        if key in UNSUPPORTED and value:
            raise ValueError(f"{key!r}: {UNSUPPORTED[key]}")
        near = _nearest(key, [name for name in known if name not in row])
        if near:
            raise ValueError(f"unknown key {key!r}; did you mean {near!r}?")
    for key in REQUIRED[kind]:
        if key not in row:
            raise ValueError(f"{key!r} is missing")


def _nearest(key: str, known: list[str]) -> str | None:
    """The known key that this one is a slip of: other case, a plural, a letter or two wrong."""
    near = get_close_matches(key.lower(), known, n=1, cutoff=0.8)
    return near[0] if near else None


def _text(row: dict[str, Any], key: str, *, optional: bool = False) -> str:
    value = row.get(key)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a text, not {_type_name(value)}")
    if not optional and not value.strip():
        raise ValueError(f"{key!r} is empty")
    return _check_unicode(value, key)


def _check_messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list with at least one message")
    checked = [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise ValueError("no assistant message: there is nothing to learn from this row")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError("the first assistant message has no user message before it")
    if roles[-1] != "assistant":
        raise ValueError(f"the last message must be the assistant's, not the {roles[-1]}'s")
    return checked


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object, not {_type_name(message)}")
    for key in message:
        if key in ("tool_calls", "function_call", "tool_call_id"):
            raise ValueError(f"{where}: {key} is not supported yet")
        near = None if key in _MESSAGE_KEYS else _nearest(key, [k for k in _MESSAGE_KEYS if k not in message])
        if near:
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {near!r}?")
    if "from" in message and "role" not in message:
        raise ValueError(f"{where}: unknown key 'from'; did you mean 'role' (and 'content' for 'value')?")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"{where}: {key!r} is missing")
    role = message["role"]
    if role in ("tool", "function"):
        raise ValueError(f"{where}: {role} messages are not supported yet")
    if not isinstance(role, str) or role not in ROLES:
        near = _nearest(role, list(ROLES)) if isinstance(role, str) else None
        hint = f"; did you mean {near!r}?" if near else f"; expected {', '.join(ROLES)}"
        raise ValueError(f"{where}: unknown role {role!r}{hint}")
    checked: Message = {"role": ROLES[role], "content": _join_parts(message["content"], where)}
    if role == "assistant" and not checked["content"].strip():
        raise ValueError(f"{where}: the assistant's content is empty")
    if message.get("weight") is not None:
        checked["weight"] = _check_weight(message["weight"], role=role, where=where)
    return checked


def _join_parts(content: Any, where: str) -> str:
    """A message's text; a list of text parts is one text in pieces."""
    if isinstance(content, str):
        return _check_unicode(content, where)
    if not isinstance(content, list):
        raise ValueError(
            f"{where}: content must be a text or a list of text parts, not {_type_name(content)}"
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else _type_name(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: only text parts are supported, not {kind}")
        texts.append(part["text"])
    return _check_unicode("".join(texts), where)


def _check_weight(weight: Any, *, role: str, where: str) -> int:
    if role != "assistant":
        raise ValueError(f"{where}: only assistant messages have a weight")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"{where}: weight must be 0 or 1, not {weight!r}")
    return int(weight)


def _check_unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair; no tokenizer takes it
        raise ValueError(f"{where}: the text holds half of a surrogate pair") from None
    return text


def _type_name(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
