"""/v1/methods: how models can be trained, and what may be asked of each method."""

from typing import Any

from fastapi import APIRouter

from api.schemas.methods import MethodList, MethodObject, ParameterObject, RowFormat
from trainers.specs import METHODS
from trainers.specs.descriptions import DESCRIPTIONS
from trainers.specs.graders import grader_schema
from trainers.specs.methods import MethodKind
from trainers.specs.names import ALIASES, DTYPE_FLAGS, IGNORED

router = APIRouter(prefix="/methods", tags=["Methods"])

_QUESTION = {"role": "user", "content": "What does an MRI use?"}
_ANSWER, _WORSE = "Strong magnets and radio waves.", "X-rays."
_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "find_slot", "arguments": '{"scanner": "MRI"}'},
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "find_slot",
        "description": "The next free appointment.",
        "parameters": {"type": "object", "properties": {"scanner": {"type": "string"}}},
    },
}
_BOOKING = [
    {"role": "user", "content": "When is the MRI free?"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Monday, 9:00"},
]
_SLOT = {"role": "assistant", "content": "On Monday at nine."}
# A row in each format, by what the rows are.
EXAMPLES: dict[str, dict[str, Any]] = {
    "conversation": {
        "messages": {"messages": [_QUESTION, {"role": "assistant", "content": _ANSWER}]},
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": _QUESTION["content"]},
                {"from": "gpt", "value": _ANSWER},
            ]
        },
        "alpaca": {"instruction": _QUESTION["content"], "input": "", "output": _ANSWER},
        "prompt_completion": {"prompt": _QUESTION["content"], "completion": _ANSWER},
    },
    "preference": {
        "preference": {"prompt": _QUESTION["content"], "chosen": _ANSWER, "rejected": _WORSE},
        "question_preference": {
            "question": _QUESTION["content"],
            "response_chosen": _ANSWER,
            "response_rejected": _WORSE,
        },
        "openai_preference": {
            "input": {"messages": [_QUESTION]},
            "preferred_output": [{"role": "assistant", "content": _ANSWER}],
            "non_preferred_output": [{"role": "assistant", "content": _WORSE}],
        },
    },
    "labelled": {"labelled": {"prompt": _QUESTION["content"], "completion": _ANSWER, "label": True}},
    "prompt": {
        "prompt": {"prompt": _QUESTION["content"]},
        "question": {"question": _QUESTION["content"]},
        "prompt_messages": {"messages": [_QUESTION]},
    },
    "document": {
        "text": {"text": "An MRI uses strong magnets and radio waves."},
        "plain_text": "An MRI uses strong magnets and radio waves.",
    },
}
# And a row with tools, where they may be listed and called.
WITH_TOOLS: dict[str, Any] = {
    "messages": {"messages": [*_BOOKING, _SLOT], "tools": [_TOOL]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": _BOOKING[0]["content"]},
            {"from": "function_call", "value": '{"name": "find_slot", "arguments": {"scanner": "MRI"}}'},
            {"from": "observation", "value": _BOOKING[2]["content"]},
            {"from": "gpt", "value": _SLOT["content"]},
        ],
        "tools": [_TOOL["function"]],
    },
    "preference": {"prompt": _BOOKING[:1], "chosen": _BOOKING[1:2], "rejected": [_SLOT], "tools": [_TOOL]},
    "openai_preference": {
        "input": {"messages": _BOOKING[:1], "tools": [_TOOL]},
        "preferred_output": _BOOKING[1:2],
        "non_preferred_output": [_SLOT],
    },
    "labelled": {"prompt": _BOOKING[:1], "completion": _BOOKING[1:2], "label": True, "tools": [_TOOL]},
    "prompt": {"prompt": _BOOKING, "tools": [_TOOL]},
    "prompt_messages": {"messages": _BOOKING, "tools": [_TOOL]},
}
# Pydantic spells a bound by its own name where it cannot know that JSON schema's means the same.
_BOUNDS = {
    "minimum": ("minimum", "ge"),
    "maximum": ("maximum", "le"),
    "exclusive_minimum": ("exclusiveMinimum", "gt"),
    "exclusive_maximum": ("exclusiveMaximum", "lt"),
}


@router.get("", summary="List methods")
def list_methods() -> MethodList:
    """Every method with its parameters, what it learns from, and the names that have no effect."""
    return MethodList(data=[_describe(kind) for kind in METHODS.values()], ignored=IGNORED)


def kinds_taken(kind: MethodKind) -> list[str]:
    """Which rows a method can learn from, those that it is made for first."""
    others = (rows for rows in EXAMPLES if rows != kind.learns_from and kind.takes(rows))
    return [kind.learns_from, *others]


def _describe(kind: MethodKind) -> MethodObject:
    schema = kind.asked.model_json_schema()
    required = schema.get("required", [])
    return MethodObject(
        name=kind.name,
        summary=kind.summary,
        learns_from=kind.learns_from,
        row_formats=[
            RowFormat(name=name, example=row, example_with_tools=WITH_TOOLS.get(name))
            for rows in kinds_taken(kind)
            for name, row in EXAMPLES[rows].items()
        ],
        parameters=[
            _describe_parameter(name, field, definitions=schema.get("$defs", {}), required=name in required)
            for name, field in schema["properties"].items()
            if name not in kind.beside
        ],
        grader=grader_schema() if "grader" in kind.beside else None,
    )


def _describe_parameter(
    name: str, field: dict[str, Any], *, definitions: dict[str, Any], required: bool
) -> ParameterObject:
    branches = [_follow(branch, definitions) for branch in field.get("anyOf", [field])]
    branches = [branch for branch in branches if branch.get("type") != "null"]
    strings = [branch for branch in branches if branch.get("type") == "string"]
    choices = [word for branch in strings for word in branch.get("enum", [branch.get("const")])]
    bounds = {
        bound: next((branch[key] for branch in branches for key in keys if key in branch), None)
        for bound, keys in _BOUNDS.items()
    }
    return ParameterObject(
        name=name,
        description=DESCRIPTIONS[name],
        types=list(dict.fromkeys(branch["type"] for branch in branches)),
        choices=choices if choices and None not in choices else None,
        required=required,
        default=field.get("default"),
        aliases=[
            *(alias for alias, ours in ALIASES.items() if ours == name),
            *(DTYPE_FLAGS if name == "dtype" else ()),
        ],
        **bounds,
    )


def _follow(branch: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    return definitions[branch["$ref"].rpartition("/")[2]] if "$ref" in branch else branch
