"""Chat completions: whole and streamed, sampling, messages, and what is refused."""

import asyncio
import re
import time
from typing import Any

import openai
from openai import BadRequestError, OpenAI

from .context import Context, conforming, refusal

QUESTION = [{"role": "user", "content": "Patient 3 has a rash. What now?"}]
SEEDED = {"temperature": 1, "seed": 3}  # the greedy answers of an untrained model say little


def ask(client: OpenAI, context: Context, **wishes: Any) -> Any:
    """Chat with the base model, 16 tokens at most, unless `wishes` say otherwise."""
    wishes = {"model": context.base, "messages": QUESTION, "max_tokens": 16} | wishes
    return client.chat.completions.create(**wishes)


def stream(client: OpenAI, context: Context, **wishes: Any) -> list[Any]:
    """All chunks of a streamed answer."""
    with ask(client, context, stream=True, **wishes) as chunks:
        return [conforming(chunk) for chunk in chunks]


def text_of(chunks: list[Any]) -> str:
    """What the chunks of an answer with one choice say."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def check_chat_whole(client: OpenAI, context: Context) -> None:
    answer = conforming(ask(client, context, temperature=0))
    assert isinstance(answer, openai.types.chat.ChatCompletion)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", context.base)
    assert abs(answer.created - time.time()) < 60
    assert answer.system_fingerprint.startswith("fp_")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason in ("stop", "length"), choice.logprobs) == (0, True, None)
    assert (choice.message.role, choice.message.refusal) == ("assistant", None)
    assert choice.message.tool_calls is None
    assert choice.message.content
    usage = answer.usage
    assert 0 < usage.completion_tokens <= 16
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert usage.completion_tokens_details.reasoning_tokens == 0
    short = ask(client, context, temperature=0, max_tokens=None, max_completion_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def check_chat_streamed(client: OpenAI, context: Context) -> None:
    whole = ask(client, context, **SEEDED)
    chunks = stream(client, context, **SEEDED)
    assert text_of(chunks) == whole.choices[0].message.content
    assert len(chunks) > 3
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]


def check_chat_streamed_with_usage(client: OpenAI, context: Context) -> None:
    *chunks, last = stream(client, context, temperature=0, stream_options={"include_usage": True})
    assert all(chunk.choices for chunk in chunks)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert last.choices == []
    whole = ask(client, context, temperature=0)
    assert last.usage == whole.usage
    error = refusal(BadRequestError, ask, client, context, stream_options={"include_usage": True})
    assert error.param == "stream_options"


def check_chat_choices(client: OpenAI, context: Context) -> None:
    wishes = SEEDED | {"n": 2}
    one = ask(client, context, **SEEDED)
    two = conforming(ask(client, context, **wishes))
    assert [choice.index for choice in two.choices] == [0, 1]
    first, second = (choice.message.content for choice in two.choices)
    assert first != second
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    assert two.usage.completion_tokens > one.usage.completion_tokens
    chunks = stream(client, context, **wishes)
    texts = {0: "", 1: ""}
    reasons: dict[int, str] = {}
    for chunk in chunks:
        [choice] = chunk.choices
        assert choice.index not in reasons
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == {0: first, 1: second}
    assert reasons == {choice.index: choice.finish_reason for choice in two.choices}


def check_chat_stops(client: OpenAI, context: Context) -> None:
    wishes = SEEDED | {"max_tokens": 32}
    full = ask(client, context, **wishes).choices[0].message.content
    stop = re.search(r"[ -~]{2}", full[4:])[0]
    for given in (stop, ["never said by anyone", stop]):
        answer = ask(client, context, **wishes, stop=given)
        assert answer.choices[0].message.content == full[: full.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert text_of(stream(client, context, **wishes, stop=given)) == full[: full.index(stop)]
    # The client's own reader of streams takes only answers that came to their end.
    with client.chat.completions.stream(model=context.base, messages=QUESTION, stop=stop, **wishes) as events:
        final = events.get_final_completion()
    assert final.choices[0].message.content == full[: full.index(stop)]


def check_chat_seeds(client: OpenAI, context: Context) -> None:
    first, again, other = (ask(client, context, temperature=1.2, seed=seed) for seed in (5, 5, 6))
    assert first.system_fingerprint == again.system_fingerprint == other.system_fingerprint
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content


def check_chat_content_and_roles(client: OpenAI, context: Context) -> None:
    whole = ask(client, context, temperature=0)
    parts = [{"type": "text", "text": "Patient 3 has"}, {"type": "text", "text": " a rash. What now?"}]
    in_parts = ask(client, context, temperature=0, messages=[{"role": "user", "content": parts}])
    assert in_parts.choices == whole.choices
    assert in_parts.usage == whole.usage
    rule = "Answer briefly."
    as_system, as_developer = (
        ask(client, context, temperature=0, messages=[{"role": role, "content": rule}, *QUESTION])
        for role in ("system", "developer")
    )
    assert as_developer.choices == as_system.choices
    assert as_developer.usage == as_system.usage
    # Two turns of the user in a row, and the assistant's before them.
    assert ask(client, context, messages=[{"role": "assistant", "content": "Hello."}, *QUESTION, *QUESTION])


def check_chat_refuses_what_it_cannot_do(client: OpenAI, context: Context) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    schema = {"name": "s", "schema": {"type": "object"}, "strict": True}
    unsupported: dict[str, Any] = {
        "tools": [tool],
        "logprobs": True,
        "response_format": {"type": "json_schema", "json_schema": schema},
        "logit_bias": {"7": 100},
    }
    for name, value in unsupported.items():
        error = refusal(BadRequestError, ask, client, context, **{name: value})
        assert (error.code, error.param) == ("unsupported_parameter", name)
    neutral = {"tool_choice": "none", "response_format": {"type": "text"}, "user": "u", "store": False}
    assert ask(client, context, **neutral).choices


def check_chat_refuses_values_out_of_range(client: OpenAI, context: Context) -> None:
    wrong = {"temperature": 2.5, "top_p": -0.1, "n": 0, "presence_penalty": 3, "max_completion_tokens": 0}
    for name, value in wrong.items():
        error = refusal(BadRequestError, ask, client, context, **{name: value})
        assert (error.code, error.param) == ("invalid_value", name)
        assert name in error.message
    error = refusal(BadRequestError, ask, client, context, max_tokens=100_000)
    assert error.code == "context_length_exceeded"


def check_async_client(_client: OpenAI, context: Context) -> None:
    async def talk() -> tuple[str, str]:
        async with openai.AsyncOpenAI(timeout=60) as client:
            job = await client.fine_tuning.jobs.retrieve(context.finished_job)
            assert [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=7)]
            wishes: dict[str, Any] = {"model": context.base, "messages": QUESTION, "max_tokens": 8}
            whole = await client.chat.completions.create(**wishes, temperature=0)
            chunks = await client.chat.completions.create(**wishes, temperature=0, stream=True)
            return whole.choices[0].message.content or "", text_of([chunk async for chunk in chunks])

    whole, streamed = asyncio.run(talk())
    assert streamed == whole
