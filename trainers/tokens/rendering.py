"""Conversations as the chat template writes them, and the check that it leaves nothing of the tools out."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainers.folders.exits import DataError
from trainers.models.chat_template import RENDER_ERRORS
from trainers.rows.messages import Message
from trainers.rows.tool_calls import Tool


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Tool],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation. Raises DataError where the template refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(
                drop_weights(messages),
                tools=to_template(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except (TemplateError, *RENDER_ERRORS) as error:
        raise DataError(f"the model's chat template refuses this conversation: {error}") from error


def drop_weights(messages: list[Message]) -> list[Message]:
    """The messages without what training alone is to know."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def to_template(tools: list[Tool]) -> Any:
    """The tools as templates expect them: none is no list at all, for some ask only whether there is one."""
    return tools or None


def check_tools_are_written(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Tool]
) -> None:
    """Raises DataError where the template leaves out a tool, a call, its result or the text beside it.

    Many templates pass over what they do not know, and a model would be trained on half of the row. Each
    of these parts is replaced by a word of its own, which must be in what the template makes of it.
    """
    places: dict[str, str] = {}

    def mark(place: str) -> str:
        word = f"RESIDENCY{len(places):06d}"
        places[word] = place
        return word

    marked_tools = [
        {**tool, "function": {**tool["function"], "name": mark(f"tools[{i}]")}}
        for i, tool in enumerate(tools)
    ]
    marked = [dict(message) for message in messages]
    for i, message in enumerate(marked):
        calls = message.get("tool_calls")
        if message["role"] == "tool" or (calls and message["content"]):
            message["content"] = mark(f"the content of messages[{i}]")
        if calls:
            words = [mark(f"messages[{i}].tool_calls[{n}]") for n in range(len(calls))]
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": {"word": word}}}
                for call, word in zip(calls, words, strict=True)
            ]
    if not places:
        return
    text = render(tokenizer, marked, marked_tools)
    left_out = [place for word, place in places.items() if word not in text]
    if left_out:
        raise DataError(
            f"the chat template leaves out {left_out[0]}, so the model would be trained without it; "
            "a model whose template knows tools is needed, or one of chatml, qwen, llama3 and mistral "
            "in chat_template"
        )
