"""The engine's HTTP face: OpenAI's chat and plain completions, vLLM's /tokenize and /health."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError

from trainers.serving.errors import add_error_handlers, describe_error
from trainers.serving.generator import GenerationFailed, Generator, Piece
from trainers.serving.sampling import Sampling
from trainers.serving.schemas import BadRequest, ChatMessage, ChatRequest, CompletionRequest, TokenizeRequest

RENDER_LIMIT_S = 10  # for a template that was honest when it was imported but hangs on some conversation
CLIENT_GONE = 499
_TEXT_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)

T = TypeVar("T")


@dataclass(frozen=True)
class Engine:
    """What the routes need: one model under one id."""

    generator: Generator
    model_id: str
    fingerprint: str
    created: int
    # One thread: tokenizers are not made for several. Off the event loop, so that health is always answered.
    text_thread: ThreadPoolExecutor


@dataclass(frozen=True)
class Job:
    """A validated request: one prompt for each group of choices, and the settings they share."""

    body: ChatRequest | CompletionRequest
    prompts: list[list[int]]
    max_tokens: list[int]
    top_k: int
    id: str
    created: int

    @property
    def n_per_prompt(self) -> int:
        return self.body.n or 1

    @property
    def n_choices(self) -> int:
        return len(self.prompts) * self.n_per_prompt

    @property
    def is_chat(self) -> bool:
        return isinstance(self.body, ChatRequest)


def create_app(engine: Engine) -> FastAPI:
    app = FastAPI(title="Residency engine", openapi_url=None)
    add_error_handlers(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        if engine.generator.failure is not None:
            return JSONResponse({"status": "failed", "error": engine.generator.failure}, status_code=503)
        return JSONResponse({"status": "ok", "active_requests": engine.generator.count_active_requests()})

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        model = {
            "id": engine.model_id,
            "object": "model",
            "created": engine.created,
            "owned_by": "residency",
            "max_model_len": engine.generator.context_length,
        }
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions", response_model=None)
    async def complete_chat(body: ChatRequest, request: Request) -> Response:
        check_body(engine, body)
        prompt = await render_chat(engine, body.messages)
        return await _answer(engine, plan_job(engine, body, [prompt]), request)

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        check_body(engine, body)
        prompts = [
            await tokenize(engine, prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts
        ]
        return await _answer(engine, plan_job(engine, body, prompts), request)

    @app.post("/tokenize")
    async def count_tokens(body: TokenizeRequest) -> dict[str, Any]:
        if body.messages is not None:
            ids = await render_chat(engine, body.messages, add_generation_prompt=body.add_generation_prompt)
        else:
            ids = await tokenize(engine, body.prompt or "", add_special_tokens=body.add_special_tokens)
        return {"count": len(ids), "max_model_len": engine.generator.context_length, "tokens": ids}

    return app


def check_body(engine: Engine, body: ChatRequest | CompletionRequest) -> None:
    if body.model != engine.model_id:
        raise BadRequest(
            f"The model {body.model!r} is not served here.", param="model", code="model_not_found", status=404
        )
    body.refuse_unsupported()


async def render_chat(
    engine: Engine, messages: list[ChatMessage], *, add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of the conversation, through the model's own template."""
    tokenizer = engine.generator.tokenizer
    if not tokenizer.chat_template:
        raise BadRequest("The model has no chat template; use /v1/completions.", code="no_chat_template")
    rows = [message.to_template(index) for index, message in enumerate(messages)]

    def render() -> list[int]:
        text = tokenizer.apply_chat_template(
            rows, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    try:
        return await _run_text(engine, render)
    except _TEXT_ERRORS as error:
        raise BadRequest(
            f"The model's chat template refuses the conversation: {error}",
            param="messages",
            code="invalid_value",
        ) from error


async def tokenize(engine: Engine, text: str, *, add_special_tokens: bool = True) -> list[int]:
    tokenizer = engine.generator.tokenizer
    try:
        return await _run_text(
            engine, lambda: tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        )
    except _TEXT_ERRORS as error:
        raise BadRequest(
            f"The text cannot be tokenized: {error}", param="prompt", code="invalid_value"
        ) from error


async def _run_text(engine: Engine, function: Any) -> list[int]:
    future = asyncio.get_running_loop().run_in_executor(engine.text_thread, function)
    try:
        return await asyncio.wait_for(future, RENDER_LIMIT_S)
    except TimeoutError:
        # A Python thread cannot be stopped; a new process can be started.
        engine.generator.fail("a chat template or text did not finish rendering")
        raise GenerationFailed("the engine is restarting") from None


def plan_job(engine: Engine, body: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> Job:
    """Check the prompts against the context and fix what is the same for all choices."""
    generator = engine.generator
    room = [generator.context_length - len(prompt) for prompt in prompts]
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    for prompt, left in zip(prompts, room, strict=True):
        if not prompt:
            raise BadRequest("The prompt is empty.", param=param, code="invalid_value")
        if max(prompt) >= generator.vocab_size:
            raise BadRequest("The prompt holds unknown token ids.", param=param, code="invalid_value")
        wanted = body.token_limit or 1
        if wanted > left:
            raise BadRequest(
                f"This model's maximum context length is {generator.context_length} tokens. However, you "
                f"requested {len(prompt) + wanted} tokens ({len(prompt)} in the {param}, {wanted} in the "
                "completion).",
                param=param,
                code="context_length_exceeded",
            )
    top_k = body.top_k or 0
    return Job(
        body=body,
        prompts=prompts,
        max_tokens=[body.token_limit or left for left in room],
        top_k=min(top_k, generator.vocab_size) if top_k > 0 else 0,
        id=("chatcmpl-" if isinstance(body, ChatRequest) else "cmpl-") + secrets.token_hex(12),
        created=int(time.time()),
    )


def generate_choice(engine: Engine, job: Job, index: int) -> AsyncGenerator[Piece]:
    body = job.body
    prompt_index = index // job.n_per_prompt
    seed = secrets.token_hex(8) if body.seed is None else body.seed
    sampling = Sampling(
        seed=f"{seed}:{index}",
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=job.top_k,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
    )
    return engine.generator.generate_text(
        job.prompts[prompt_index],
        sampling=sampling,
        max_tokens=job.max_tokens[prompt_index],
        stops=body.stops,
    )


async def generate_choices(engine: Engine, job: Job) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of all choices as they come. Closing it cancels what still runs."""
    merged: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

    async def run(index: int) -> None:
        try:
            async with aclosing(generate_choice(engine, job, index)) as pieces:
                async for piece in pieces:
                    merged.put_nowait((index, piece))
        except GenerationFailed as error:
            merged.put_nowait(error)

    tasks = [asyncio.create_task(run(index)) for index in range(job.n_choices)]
    try:
        n_open = len(tasks)
        while n_open:
            item = await merged.get()
            if isinstance(item, BaseException):
                raise item
            n_open -= item[1].finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(engine: Engine, job: Job, request: Request) -> Response:
    if engine.generator.failure is not None:
        raise GenerationFailed(engine.generator.failure)
    if job.body.stream:
        headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
        return StreamingResponse(stream_frames(engine, job), media_type="text/event-stream", headers=headers)
    answer = await _unless_disconnected(request, collect_answer(engine, job))
    return Response(status_code=CLIENT_GONE) if answer is None else JSONResponse(answer)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None after cancelling it because nobody waits for it any more."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work)
    gone = asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def collect_answer(engine: Engine, job: Job) -> dict[str, Any]:
    texts = [""] * job.n_choices
    ends: dict[int, Piece] = {}
    async with aclosing(generate_choices(engine, job)) as pieces:
        async for index, piece in pieces:
            texts[index] += piece.text
            if piece.finish_reason:
                ends[index] = piece
    choices = []
    for index, text in enumerate(texts):
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": ends[index].finish_reason,
            "logprobs": None,
        }
        if job.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        else:
            choice["text"] = text
        choices.append(choice)
    answer = _frame(engine, job, choices, kind="chat.completion" if job.is_chat else "text_completion")
    answer["usage"] = count_usage(job, [end.n_tokens for end in ends.values()])
    return answer | ({"service_tier": "default"} if job.is_chat else {})


async def stream_frames(engine: Engine, job: Job) -> AsyncGenerator[str]:
    """Server-sent events: role, deltas, one finish for each choice, usage where asked for, [DONE]."""
    include_usage = job.body.stream_options is not None and bool(job.body.stream_options.include_usage)
    kind = "chat.completion.chunk" if job.is_chat else "text_completion"

    def write(choices: list[dict[str, Any]], **more: Any) -> str:
        usage = {"usage": None} if include_usage else {}
        return _write_event(_frame(engine, job, choices, kind=kind) | usage | more)

    def choose(index: int, text: str, reason: str | None) -> dict[str, Any]:
        if not job.is_chat:
            return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    n_tokens = [0] * job.n_choices
    if job.is_chat:
        for index in range(job.n_choices):
            yield write([choose(index, "", None) | {"delta": {"role": "assistant", "content": ""}}])
    try:
        async with aclosing(generate_choices(engine, job)) as pieces:
            async for index, piece in pieces:
                n_tokens[index] = piece.n_tokens
                if piece.text:
                    yield write([choose(index, piece.text, None)])
                if piece.finish_reason:
                    yield write([choose(index, "", piece.finish_reason)])
    except GenerationFailed as error:
        yield _write_event({"error": describe_error(str(error), "server_error", code="engine_failed")})
        return
    if include_usage:
        yield write([], usage=count_usage(job, n_tokens))
    yield "data: [DONE]\n\n"


def _frame(engine: Engine, job: Job, choices: list[dict[str, Any]], *, kind: str) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": kind,
        "created": job.created,
        "model": engine.model_id,
        "system_fingerprint": engine.fingerprint,
        "choices": choices,
    }


def _write_event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def count_usage(job: Job, n_tokens: list[int]) -> dict[str, Any]:
    """Each prompt counts once, however many choices it has."""
    prompt_tokens, completion_tokens = sum(map(len, job.prompts)), sum(n_tokens)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
