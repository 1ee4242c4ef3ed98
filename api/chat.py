"""/v1/chat/completions: finds the engine of a model, waits for it if need be, and passes its answer on."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.auth import CallerDep
from api.connections import Client
from api.deps import DatabaseDep, SettingsDep
from api.disconnect import unless_disconnected
from api.errors import NEVER_RETRY, ApiError, error_body
from api.instruments import count_tokens
from api.schemas.chat import ChatRequest
from api.watch import Watch, WatchDep
from db import deployments, registry
from db.session import Database, clock

router = APIRouter(prefix="/chat", tags=["Chat"])
logger = logging.getLogger(__name__)

_POLL_S = 0.25
_TOUCH_EVERY_S = 5.0
# The official clients wait as long for the next byte.
_ANSWER_TIMEOUT_S = 600.0
# Told to stop, the server cuts after five seconds what has no end by then; a stream that says so is better.
_LAST_S = 3.0
_PASSED_ON = ("content-type", "retry-after", "x-should-retry")


def new_client() -> httpx.AsyncClient:
    """The client for all engines of this app."""
    return Client(
        timeout=httpx.Timeout(_ANSWER_TIMEOUT_S, connect=5.0, pool=None),
        # A kept connection may be to an engine that has been restarted; a new one costs nothing here.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,  # engines are never behind a proxy
    )


@router.post("/completions", summary="Create chat completion", response_class=Response)
async def create_chat_completion(
    body: ChatRequest,
    request: Request,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    watch: WatchDep,
) -> Response:
    """Chat with a deployed model; with `stream` the answer comes as server-sent events.

    Parameters are the engine's. The chat template is the model's own and cannot be given.
    """
    for name in body.model_extra or {}:
        if name.startswith("chat_template"):
            message = "The chat template belongs to the model and cannot be given in a request."
            raise ApiError(400, "unsupported_parameter", message, param=name)
    finder = _Finder(database, org_id=caller.org_id, model_id=body.model, auto=settings.auto_deploy)
    address = await _wait_until_ready(request, finder, watch, hold_s=settings.chat_hold_s)
    call = request.app.state.engines.build_request(
        "POST",
        f"{address}/v1/chat/completions",
        content=json.dumps(body.model_dump(exclude_unset=True)),
        headers={"content-type": "application/json"},
    )
    upstream = await unless_disconnected(request, _send(request.app.state.engines, call))
    headers = {name: upstream.headers[name] for name in _PASSED_ON if name in upstream.headers}
    if headers.get("content-type", "").startswith("text/event-stream"):
        return _EngineStream(upstream, watch, headers=headers, model=body.model)
    content = await unless_disconnected(request, _read_whole(upstream))
    if upstream.is_success and headers.get("content-type", "").startswith("application/json"):
        count_tokens(body.model, json.loads(content).get("usage"))
    return Response(content, upstream.status_code, headers=headers)


@dataclass(frozen=True)
class _Finder:
    """Looks for the deployment of a model, once a call, in a session of its own."""

    database: Database
    org_id: str
    model_id: str
    auto: bool

    def find(self) -> str | None:
        """The address of the engine, None while it is not ready. Raises ApiError, `NotFound`."""
        with self.database.read() as session:
            model = registry.get(session, self.model_id, org_id=self.org_id)
            deployment = deployments.find_live(session, model, org_id=self.org_id)
            now = clock(session)
        if model.status == "importing":
            message = registry.describe_unready(model)
            raise ApiError(503, "model_not_ready", message, headers={"retry-after": "5"})
        if model.status != "ready":
            raise ApiError(400, "model_not_ready", registry.describe_unready(model), param="model")
        if deployment is None and not self.auto:
            message = f"The model '{model.id}' is not deployed. Deploy it with POST /v1/deployments."
            raise ApiError(400, "model_not_deployed", message, param="model")
        if deployment is None:
            with self.database.write() as session:
                model = registry.get_ready(session, self.model_id, org_id=self.org_id, hold=True)
                deployments.ensure(session, model, org_id=self.org_id, auto=True)
            return None
        if deployment.status == "failed":
            reason = (deployment.error or {}).get("message", "its engine did not start")
            message = f"The deployment of '{model.id}' failed: {reason}"
            raise ApiError(503, "deployment_failed", message, headers=NEVER_RETRY)
        if now - deployment.last_used_at > _TOUCH_EVERY_S:
            with self.database.write() as session:
                deployments.touch(session, deployment.id)
        return deployment.address if deployment.status == "ready" else None


async def _wait_until_ready(request: Request, finder: _Finder, watch: Watch, *, hold_s: float) -> str:
    """The address of the engine, as soon as it is ready."""
    deadline = time.monotonic() + hold_s
    while (address := await run_in_threadpool(finder.find)) is None:
        if time.monotonic() >= deadline or watch.stopped_for_s:
            message = f"The model '{finder.model_id}' is still being loaded; try again."
            raise ApiError(503, "model_loading", message, headers={"retry-after": "5"})
        if await request.is_disconnected():
            raise ClientDisconnect
        await asyncio.sleep(_POLL_S)
    return address


async def _send(client: httpx.AsyncClient, call: httpx.Request) -> httpx.Response:
    """The head of the engine's answer."""
    try:
        return await client.send(call, stream=True)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        message = "The engine of the model is being restarted; try again."
        raise ApiError(503, "model_loading", message, headers={"retry-after": "1"}) from error
    except httpx.TimeoutException as error:
        message = f"The engine did not answer within {_ANSWER_TIMEOUT_S:.0f} seconds."
        raise ApiError(503, "engine_timeout", message, headers=NEVER_RETRY) from error
    except httpx.HTTPError as error:
        raise _engine_died(error) from error


async def _read_whole(upstream: httpx.Response) -> bytes:
    try:
        return await upstream.aread()
    except httpx.HTTPError as error:
        raise _engine_died(error) from error
    finally:
        await upstream.aclose()


def _engine_died(error: httpx.HTTPError) -> ApiError:
    logger.warning("an engine died while it answered: %r", error)
    message = "The engine of the model died while it answered; try again."
    return ApiError(503, "engine_died", message, headers={"retry-after": "1"})


class _EngineStream(StreamingResponse):
    """Passes an engine's events on, and closes its connection when the client leaves."""

    def __init__(
        self, upstream: httpx.Response, watch: Watch, *, headers: dict[str, str], model: str
    ) -> None:
        # Proxies that buffer would turn the stream into one late lump.
        super().__init__(
            _frames(upstream, watch, model=model),
            headers=headers | {"x-accel-buffering": "no", "cache-control": "no-cache"},
        )
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._upstream.aclose()


async def _frames(upstream: httpx.Response, watch: Watch, *, model: str) -> AsyncIterator[bytes]:
    """The engine's events as they come, in whole lines; an error event if they end before `[DONE]`."""
    partial, done = b"", False
    code, message = "engine_died", "The engine of the model died while it answered."
    try:
        async for chunk in upstream.aiter_bytes():
            whole, newline, rest = (partial + chunk).rpartition(b"\n")
            partial = rest
            done = done or b"\ndata: [DONE]" in b"\n" + whole
            if newline:
                _count_usage(model, whole)
                yield whole + newline
            if watch.stopped_for_s > _LAST_S:
                code, message = "server_stopping", "The server is being restarted; ask again."
                break
    except httpx.HTTPError as error:
        logger.warning("an engine died in the middle of a stream: %r", error)
    if not done:
        event: dict[str, Any] = error_body(500, code, message)
        # The empty line ends an event that the engine may have left open.
        yield f"\ndata: {json.dumps(event)}\n\n".encode()


def _count_usage(model: str, lines: bytes) -> None:
    for line in lines.split(b"\n"):
        if line.startswith(b"data: {") and b'"usage"' in line:
            count_tokens(model, json.loads(line[6:]).get("usage"))
