"""Tools in conversations: those that a model may call, its calls, and which call a result answers."""

from typing import Any

from trainers.rows.json_values import check_json, load_json, nearest, type_name
from trainers.specs.faults import RowFault

Tool = dict[str, Any]  # {"type": "function", "function": {"name", "description"?, "parameters"?}}
# {"type": "function", "id", "function": {"name", "arguments"}}: an object, as chat templates want it
Call = dict[str, Any]


def check_tools(value: Any, where: str = "tools") -> list[Tool]:
    """The tools of a row: OpenAI's list, or bare functions; either may be a JSON text. Raises ValueError."""
    if isinstance(value, str):
        value = load_json(value, where) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowFault("tools", f"{where!r} must be a list of tools, not {type_name(value)}")
    tools = [_check_tool(tool, f"{where}[{i}]") for i, tool in enumerate(value)]
    names = [tool["function"]["name"] for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RowFault("tools", f"{where}[{i}]: an earlier tool has the name {name!r}")
    return tools


def check_calls(value: Any, where: str) -> list[Call]:
    """A message's calls, arguments as objects; an `id` only where one was given. Raises ValueError."""
    if not isinstance(value, list):
        raise RowFault("tools", f"{where} must be a list of calls, not {type_name(value)}")
    calls = [_check_call(call, f"{where}[{i}]") for i, call in enumerate(value)]
    ids = [call["id"] for call in calls if "id" in call]
    if len(set(ids)) < len(ids):
        raise RowFault("tools", f"{where}: two calls have the same id")
    return calls


def pair_results(messages: list[dict[str, Any]], where: str) -> None:
    """Gives each tool message the id and name of the call that it answers. Raises ValueError.

    Calls without ids are answered in their order, and get ids of nine letters and digits, which is the
    only form that Mistral's templates take.
    """
    waiting: list[Call] = []
    ids_given, n_calls = False, 0
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            call = _find_call(message.get("tool_call_id"), waiting, ids_given, where=f"{where}[{i}]")
            waiting.remove(call)
            message |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
            continue
        waiting = list(message.get("tool_calls", []))
        ids_given = any("id" in call for call in waiting)
        for call in waiting:
            call.setdefault("id", f"call{n_calls:05d}")
            n_calls += 1


def _find_call(call_id: str | None, waiting: list[Call], ids_given: bool, *, where: str) -> Call:
    if not waiting:
        raise RowFault(
            "tools", f"{where}: a tool's result must follow the assistant's call, which is not there"
        )
    if call_id is None:
        if ids_given:
            raise RowFault("tools", f"{where}: 'tool_call_id' is missing")
        return waiting[0]
    for call in waiting:
        if call["id"] == call_id:
            return call
    expected = ", ".join(repr(call["id"]) for call in waiting)
    raise RowFault(
        "tools", f"{where}: unknown tool_call_id {call_id!r}; the calls without a result are {expected}"
    )


def _check_tool(tool: Any, where: str) -> Tool:
    function = _unwrap(tool, "parameters", where)
    for key, kind, words in (("description", str, "a text"), ("parameters", dict, "an object")):
        if not isinstance(function.get(key), kind | None):
            raise RowFault("tools", f"{where}: {key} must be {words}, not {type_name(function[key])}")
    check_json(function, where)
    return {"type": "function", "function": function}


def _check_call(call: Any, where: str) -> Call:
    function = _unwrap(call, "arguments", where)
    if "arguments" not in function:
        near = nearest("arguments", list(function))
        raise RowFault("tools", f"{where}: 'arguments' is missing" + (f"; is it {near!r}?" if near else ""))
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = load_json(arguments, f"{where}: arguments")
    if not isinstance(arguments, dict):
        raise RowFault("tools", f"{where}: arguments must be a JSON object, not {type_name(arguments)}")
    check_json([function["name"], arguments], where)
    checked = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    call_id = call.get("id")
    if call_id is None:
        return checked
    if not isinstance(call_id, str) or not call_id:
        raise RowFault("tools", f"{where}: id must be a text, not {type_name(call_id)}")
    return {"id": call_id, **checked}


def _unwrap(value: Any, other_key: str, where: str) -> dict[str, Any]:
    """The function of a tool or a call; without OpenAI's wrapping it has a `name` of its own."""
    if not isinstance(value, dict):
        raise RowFault("tools", f"{where} must be an object, not {type_name(value)}")
    if value.get("type", "function") != "function":
        raise RowFault("tools", f"{where}: only the type 'function' is supported, not {value['type']!r}")
    function = value if "function" not in value and "name" in value else value.get("function")
    if not isinstance(function, dict):
        raise RowFault("tools", f"{where}: 'function' must be an object with 'name' and {other_key!r}")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowFault("tools", f"{where}: the function's 'name' must be a text that is not empty")
    return function
