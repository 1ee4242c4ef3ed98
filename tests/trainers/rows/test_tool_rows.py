"""Rows with tools: what is read of each format, and what is refused, on which line."""

import json
from typing import Any

import pytest

from trainers.rows.files import RowError, Rows
from trainers.rows.formats import AnyRow, Labelled, Pair, Prompt, Row
from trainers.specs.layouts import Layout
from trainers.validate import check_file

FUNCTION = {
    "name": "look_up",
    "description": "Looks a word up.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
USER = {"role": "user", "content": "What is 发烧?"}
ANSWER = {"role": "assistant", "content": "A fever."}


def call(arguments: Any = '{"word": "发烧", "limit": 2}', **keys: Any) -> dict:
    return {"type": "function", "function": {"name": "look_up", "arguments": arguments}, **keys}


CALL = {"role": "assistant", "content": None, "tool_calls": [call(id="c1")]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"meaning": "fever"}'}
TALK = [USER, CALL, RESULT, ANSWER]
# The same as it is handed to a chat template.
READ_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [call({"word": "发烧", "limit": 2}, id="c1")],
}
READ_TALK = [USER, READ_CALL, {**RESULT, "name": "look_up"}, ANSWER]


def read(write_jsonl, row: dict) -> AnyRow | RowError:
    (only,) = list(Rows(write_jsonl([row]), Layout()))
    return only


def test_messages_with_calls_and_results(write_jsonl) -> None:
    row = {"messages": TALK, "tools": TOOLS, "parallel_tool_calls": False}
    assert read(write_jsonl, row) == Row(1, READ_TALK, TOOLS)
    # To end with a call is to learn to call.
    weighted = {"messages": [USER, {**CALL, "weight": 1}], "tools": TOOLS}
    assert read(write_jsonl, weighted) == Row(1, [USER, {**READ_CALL, "weight": 1}], TOOLS)
    without = {"messages": [USER, {**ANSWER, "tool_calls": None}], "tools": None}
    assert read(write_jsonl, without) == Row(1, [USER, ANSWER])


def test_results_are_told_apart_by_the_ids_of_their_calls(write_jsonl) -> None:
    calls = {
        "role": "assistant",
        "content": "Both:",
        "tool_calls": [call(id="a"), call('{"word": "b"}', id="b")],
    }
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("b", "a")]
    got = read(write_jsonl, {"messages": [USER, calls, *results, ANSWER], "tools": TOOLS})
    assert isinstance(got, Row)
    assert [(m["tool_call_id"], m["content"]) for m in got.messages[2:4]] == [("b", "b"), ("a", "a")]
    assert got.messages[1]["content"] == "Both:"


@pytest.mark.parametrize("tools", [[FUNCTION], TOOLS, json.dumps([FUNCTION]), json.dumps(TOOLS)])
def test_sharegpt_rows_with_tools(write_jsonl, tools) -> None:
    value = {"name": "look_up", "arguments": {"word": "发烧", "limit": 2}}
    for called in (value, [value], value | {"arguments": json.dumps(value["arguments"])}):
        turns = [
            {"from": "human", "value": USER["content"]},
            {"from": "function_call", "value": json.dumps(called)},
            {"from": "observation", "value": RESULT["content"]},
            {"from": "gpt", "value": ANSWER["content"]},
        ]
        got = read(write_jsonl, {"conversations": turns, "tools": tools})
        # Numbered, in the only form that Mistral's own templates take.
        numbered = {**READ_CALL, "tool_calls": [call(value["arguments"], id="call00000")]}
        result = {**RESULT, "tool_call_id": "call00000", "name": "look_up"}
        assert got == Row(1, [USER, numbered, result, ANSWER], TOOLS)


def test_calls_without_ids_are_answered_in_their_order(write_jsonl) -> None:
    values = [{"name": name, "arguments": {}} for name in ("first", "second")]
    turns = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": json.dumps(values)},
        {"from": "observation", "value": "1"},
        {"from": "observation", "value": "2"},
        {"from": "function_call", "value": json.dumps(values[0])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "A"},
    ]
    got = read(write_jsonl, {"conversations": turns})
    assert isinstance(got, Row)
    results = [(m["content"], m["name"], m["tool_call_id"]) for m in got.messages if m["role"] == "tool"]
    assert results == [
        ("1", "first", "call00000"),
        ("2", "second", "call00001"),
        ("3", "first", "call00002"),
    ]


def test_tools_in_preferences_labels_and_prompts(write_jsonl) -> None:
    asked, prompt = [USER, CALL, RESULT], READ_TALK[:3]
    rows = [
        {
            "input": {"messages": asked, "tools": TOOLS, "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [CALL],
        },
        {"prompt": asked, "chosen": [ANSWER], "rejected": [CALL], "tools": TOOLS},
        {
            "conversations": [
                {"from": "human", "value": USER["content"]},
                {"from": "function_call", "value": json.dumps(call()["function"])},
                {"from": "observation", "value": "x"},
            ],
            "chosen": "Yes.",
            "rejected": "No.",
            "tools": json.dumps(TOOLS),
        },
    ]
    for row in rows[:2]:
        assert read(write_jsonl, row) == Pair(1, prompt, ANSWER, READ_CALL, TOOLS)
    turns = read(write_jsonl, rows[2])
    assert isinstance(turns, Pair)
    assert ([m["role"] for m in turns.prompt], turns.tools) == (["user", "assistant", "tool"], TOOLS)

    labelled = {"messages": asked, "completion": [CALL], "label": False, "tools": TOOLS}
    assert read(write_jsonl, labelled) == Labelled(1, prompt, READ_CALL, False, TOOLS)
    for row in ({"prompt": asked, "tools": TOOLS}, {"messages": asked, "tools": TOOLS}):
        assert read(write_jsonl, row) == Prompt(1, prompt, TOOLS)


def talk(*messages: dict, **keys: Any) -> dict:
    return {"messages": [USER, *messages, ANSWER], **keys}


def calling(*calls: Any) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def turns(*pairs: tuple[str, Any]) -> dict:
    return {"conversations": [{"from": "human", "value": "Q"}, *({"from": f, "value": v} for f, v in pairs)]}


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (talk(calling(call("{"))), "messages[1].tool_calls[0]: arguments is not JSON: "),
        (talk(calling(call("[1]"))), "tool_calls[0]: arguments must be a JSON object, not a list"),
        (talk(calling(call("")), RESULT), "arguments is not JSON"),
        (talk(calling(call('{"x": NaN}'))), "NaN"),
        (talk(calling(call('{"x": "\\ud800"}'))), "surrogate"),
        (talk(calling(call("[" * 100_000))), "too deep"),
        (talk(calling({"function": {"name": "f", "argument": "{}"}})), "is it 'argument'?"),
        (talk(calling({"function": {"arguments": "{}"}})), "the function's 'name'"),
        (talk(calling({"type": "custom", "custom": {}})), "only the type 'function'"),
        (talk(calling("look_up()")), "tool_calls[0] must be an object, not a text"),
        (talk(calling({"id": "c"})), "'function' must be an object with 'name' and 'arguments'"),
        (talk(calling(call(id=7))), "id must be a text, not a number"),
        (talk(calling(call(id="a"), call(id="a"))), "two calls have the same id"),
        (talk({**CALL, "tool_calls": {}}), "content must be a text"),
        (talk({**CALL, "tool_calls": {"id": 1}}), "tool_calls must be a list of calls, not an object"),
        (talk({"role": "user", "content": "x", "tool_calls": [call()]}), "only assistant messages"),
        (talk({"role": "user", "content": "x", "tool_call_id": "a"}), "only tool messages"),
        (talk({**CALL, "tool_calls": []}), "not null"),
        (talk({"role": "assistant", "content": "", "tool_calls": []}), "empty"),
        (talk({"role": "assistant", "tool_call": [call()]}), "did you mean 'tool_calls'?"),
        (talk(RESULT), "messages[1]: a tool's result must follow the assistant's call"),
        (talk(CALL, RESULT, {**RESULT}), "messages[3]: a tool's result must follow"),
        (talk(CALL, USER, RESULT), "messages[3]: a tool's result must follow"),
        (
            talk(CALL, {**RESULT, "tool_call_id": "c2"}),
            "unknown tool_call_id 'c2'; the calls without a result are 'c1'",
        ),
        (talk(CALL, {"role": "tool", "content": "x"}), "messages[2]: 'tool_call_id' is missing"),
        (talk(CALL, {**RESULT, "tool_call_id": 1}), "tool_call_id must be a text, not a number"),
        (talk(CALL, {**RESULT, "content": None}), "content must be a text"),
        (talk(CALL, {**RESULT, "weight": 1}), "only assistant messages have a weight"),
        (
            {"messages": [USER, ANSWER, CALL, RESULT], "chosen": "a", "rejected": "b"},
            "'prompt' is missing",
        ),
        (talk(tools={"type": "function"}), "'tools' must be a list of tools, not an object"),
        (talk(tools="{"), "tools is not JSON"),
        (talk(tools=[{}]), "tools[0]: 'function' must be an object with 'name' and 'parameters'"),
        (talk(tools=["f"]), "tools[0] must be an object, not a text"),
        (talk(tools=[{"type": "retrieval"}]), "only the type 'function' is supported, not 'retrieval'"),
        (talk(tools=[{"type": "function", "function": {"name": ""}}]), "tools[0]: the function's 'name'"),
        (talk(tools=[{"name": "f", "parameters": []}]), "tools[0]: parameters must be an object, not a list"),
        (talk(tools=[{"name": "f", "description": 1}]), "tools[0]: description must be a text"),
        (talk(tools=[{"name": "f"}, {"name": "f"}]), "tools[1]: an earlier tool has the name 'f'"),
        (talk(parallel_tool_calls="yes"), "'parallel_tool_calls' must be true or false"),
        (turns(("function_call", "look_up(x)"), ("gpt", "A")), "conversations[1]: value is not JSON"),
        (turns(("function_call", '{"name": "f"}'), ("gpt", "A")), "'arguments' is missing"),
        (turns(("function_call", "3"), ("gpt", "A")), "tool_calls[0] must be an object, not a number"),
        (turns(("observation", "x"), ("gpt", "A")), "conversations[1]: a tool's result must follow"),
        (
            {
                "input": {"messages": [USER], "tools": [{}]},
                "preferred_output": [ANSWER],
                "non_preferred_output": [CALL],
            },
            "input.tools[0]: 'function'",
        ),
        ({"prompt": [USER], "chosen": [CALL], "rejected": [CALL]}, "are the same"),
    ],
)
def test_what_is_wrong_with_tools_is_told_with_its_place(write_jsonl, row: dict, part: str) -> None:
    report = check_file(
        write_jsonl([talk(), row] if "messages" in row and "chosen" not in row else [row]), Layout()
    )
    (error,) = report["errors"]
    assert part in error["message"]
    assert error["line"] == report["rows"]
