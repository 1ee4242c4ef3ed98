"""Messages of a conversation as users write them, checked and brought into one form."""

from difflib import get_close_matches
from typing import Any

Message = dict[str, Any]  # role and content, and weight where it was given

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_MESSAGE_KEYS = ("role", "content", "weight", "name")


def check_conversation(messages: Any, where: str = "messages") -> list[Message]:
    """Messages that end with the assistant. Raises ValueError on what cannot be trained on."""
    checked = check_messages(messages, where)
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise ValueError("no assistant message: there is nothing to learn from this row")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError("the first assistant message has no user message before it")
    if roles[-1] != "assistant":
        raise ValueError(f"the last message must be the assistant's, not the {roles[-1]}'s")
    return checked


def check_prompt(messages: Any, where: str = "messages") -> list[Message]:
    """Messages that end with the user, so that an answer may follow. Raises ValueError."""
    checked = check_messages(messages, where)
    if checked[-1]["role"] != "user":
        raise ValueError(f"{where}: the last message must be the user's, not the {checked[-1]['role']}'s")
    return checked


def check_messages(messages: Any, where: str = "messages") -> list[Message]:
    """Every message with a known role and a text. Raises ValueError that names the place."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'{where}' must be a list with at least one message")
    return [_check_message(message, f"{where}[{i}]") for i, message in enumerate(messages)]


def from_sharegpt(turns: Any, where: str = "conversations") -> list[Any]:
    """`{"from", "value"}` turns under the names of `{"role", "content"}`, unchecked otherwise."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'{where}' must be a list with at least one turn")
    return [_from_turn(turn, f"{where}[{i}]") for i, turn in enumerate(turns)]


def _from_turn(turn: Any, where: str) -> Any:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} must be an object, not {type_name(turn)}")
    for key in ("from", "value"):
        if key not in turn:
            near = nearest(key, list(turn))
            raise ValueError(f"{where}: {key!r} is missing" + (f"; is it {near!r}?" if near else ""))
    speaker = turn["from"]
    if speaker in ("function_call", "observation", "tool", "function"):
        raise ValueError(f"{where}: {speaker} turns are not supported yet")
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise ValueError(f"{where}: unknown speaker {speaker!r}; expected {', '.join(_SHAREGPT_ROLES)}")
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    return {"role": _SHAREGPT_ROLES[speaker], "content": turn["value"], **weight}


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object, not {type_name(message)}")
    for key in message:
        if key in ("tool_calls", "function_call", "tool_call_id"):
            raise ValueError(f"{where}: {key} is not supported yet")
        near = None if key in _MESSAGE_KEYS else nearest(key, [k for k in _MESSAGE_KEYS if k not in message])
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
        near = nearest(role, list(ROLES)) if isinstance(role, str) else None
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
        return check_unicode(content, where)
    if not isinstance(content, list):
        raise ValueError(f"{where}: content must be a text or a list of text parts, not {type_name(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type_name(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: only text parts are supported, not {kind}")
        texts.append(part["text"])
    return check_unicode("".join(texts), where)


def _check_weight(weight: Any, *, role: str, where: str) -> int:
    if role != "assistant":
        raise ValueError(f"{where}: only assistant messages have a weight")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"{where}: weight must be 0 or 1, not {weight!r}")
    return int(weight)


def check_unicode(text: str, where: str) -> str:
    """`text`, which a tokenizer can take. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair; no tokenizer takes it
        raise ValueError(f"{where}: the text holds half of a surrogate pair") from None
    return text


def nearest(key: str, known: list[str]) -> str | None:
    """The known key that this one is a slip of: other case, a plural, a letter or two wrong."""
    near = get_close_matches(key.lower(), known, n=1, cutoff=0.8)
    return near[0] if near else None


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
