"""Messages of a conversation as users write them, checked and brought into one form."""

from typing import Any

from trainers.rows.json_values import check_unicode, load_json, nearest, type_name, wrong_type
from trainers.rows.tool_calls import check_calls, pair_results
from trainers.specs.faults import RowFault

# role and content; where given, an assistant's weight and tool_calls; of a tool also tool_call_id and name
Message = dict[str, Any]

# What has more is told to its owner: it may be several conversations, or cut when it is trained on.
MANY_TURNS = 100
MANY_CHARS = 32_768  # in all its messages

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_MESSAGE_KEYS = ("role", "content", "weight", "name", "tool_calls", "tool_call_id")


def check_conversation(messages: Any, where: str = "messages") -> list[Message]:
    """Messages that end with the assistant. Raises ValueError on what cannot be trained on."""
    checked = check_messages(messages, where)
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise RowFault("odd_last_turn", "no assistant message: there is nothing to learn from this row")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowFault("role_order", "the first assistant message has no user message before it")
    if roles[-1] != "assistant":
        raise RowFault("odd_last_turn", f"the last message must be the assistant's, not the {roles[-1]}'s")
    return checked


def check_prompt(messages: Any, where: str = "messages") -> list[Message]:
    """Messages that end with the user or a tool, so that an answer may follow. Raises ValueError."""
    checked = check_messages(messages, where)
    if checked[-1]["role"] not in ("user", "tool"):
        raise RowFault(
            "odd_last_turn",
            f"{where}: the last message must be the user's or a tool's, not the {checked[-1]['role']}'s",
        )
    return checked


def check_messages(messages: Any, where: str = "messages") -> list[Message]:
    """Every message with a known role and a text or calls. Raises ValueError that names the place."""
    if not isinstance(messages, list) or not messages:
        raise RowFault("empty_value", f"'{where}' must be a list with at least one message")
    checked = [_check_message(message, f"{where}[{i}]") for i, message in enumerate(messages)]
    pair_results(checked, where)
    return checked


def from_sharegpt(turns: Any, where: str = "conversations") -> list[Any]:
    """`{"from", "value"}` turns under the names of `{"role", "content"}`, unchecked otherwise."""
    if not isinstance(turns, list) or not turns:
        raise RowFault("empty_value", f"'{where}' must be a list with at least one turn")
    return [_from_turn(turn, f"{where}[{i}]") for i, turn in enumerate(turns)]


def _from_turn(turn: Any, where: str) -> Any:
    if not isinstance(turn, dict):
        raise wrong_type(f"{where} must be an object", turn)
    for key in ("from", "value"):
        if key not in turn:
            near = nearest(key, list(turn))
            raise RowFault(
                "missing_key", f"{where}: {key!r} is missing" + (f"; is it {near!r}?" if near else "")
            )
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise RowFault(
            "unknown_role", f"{where}: unknown speaker {speaker!r}; expected {', '.join(_SHAREGPT_ROLES)}"
        )
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    if speaker == "function_call":
        calls = load_json(value, f"{where}: value") if isinstance(value, str) else value
        return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **weight}
    return {"role": _SHAREGPT_ROLES[speaker], "content": value, **weight}


def _check_message(message: Any, where: str) -> Message:
    role = _check_keys(message, where)
    calls = message.get("tool_calls")
    content = message.get("content")
    # With calls an assistant need not say anything.
    checked: Message = {
        "role": ROLES[role],
        "content": "" if calls and content is None else _join_parts(content, where),
    }
    if calls is not None and role != "assistant":
        raise RowFault("tools", f"{where}: only assistant messages have tool_calls")
    if calls:
        checked["tool_calls"] = check_calls(calls, f"{where}.tool_calls")
    elif role == "assistant" and not checked["content"].strip():
        raise RowFault("empty_value", f"{where}: the assistant's content is empty")
    if message.get("weight") is not None:
        checked["weight"] = _check_weight(message["weight"], role=role, where=where)
    call_id = message.get("tool_call_id")
    if call_id is None:
        return checked
    if role != "tool":
        raise RowFault("tools", f"{where}: only tool messages have a tool_call_id")
    if not isinstance(call_id, str):
        raise wrong_type(f"{where}: tool_call_id must be a text", call_id)
    return {**checked, "tool_call_id": call_id}


def _check_keys(message: Any, where: str) -> str:
    """The role of a message that has the keys it needs, under their names."""
    if not isinstance(message, dict):
        raise wrong_type(f"{where} must be an object", message)
    for key in message:
        if key == "function_call" and message[key] is not None:
            raise RowFault("unsupported_key", f"{where}: function_call is not supported; write tool_calls")
        near = None if key in _MESSAGE_KEYS else nearest(key, [k for k in _MESSAGE_KEYS if k not in message])
        if near:
            raise RowFault("unknown_key", f"{where}: unknown key {key!r}; did you mean {near!r}?")
    if "from" in message and "role" not in message:
        raise RowFault(
            "unknown_key", f"{where}: unknown key 'from'; did you mean 'role' (and 'content' for 'value')?"
        )
    for key in ("role", "content"):
        if key not in message and not (key == "content" and message.get("tool_calls")):
            raise RowFault("missing_key", f"{where}: {key!r} is missing")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        near = nearest(role, list(ROLES)) if isinstance(role, str) else None
        hint = f"; did you mean {near!r}?" if near else f"; expected {', '.join(ROLES)}"
        raise RowFault("unknown_role", f"{where}: unknown role {role!r}{hint}")
    return role


def _join_parts(content: Any, where: str) -> str:
    """A message's text; a list of text parts is one text in pieces."""
    if isinstance(content, str):
        return check_unicode(content, where)
    if not isinstance(content, list):
        raise wrong_type(f"{where}: content must be a text or a list of text parts", content)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type_name(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowFault("unsupported_key", f"{where}: only text parts are supported, not {kind!r}")
        texts.append(part["text"])
    return check_unicode("".join(texts), where)


def _check_weight(weight: Any, *, role: str, where: str) -> int:
    if role != "assistant":
        raise RowFault("invalid_value", f"{where}: only assistant messages have a weight")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowFault("invalid_value", f"{where}: weight must be 0 or 1, not {weight!r}")
    return int(weight)
