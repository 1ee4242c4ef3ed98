"""What surrounds every request: its id, its clock, the bound on its body, the last net under its faults."""

import asyncio
import logging
import time
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError, error_response
from api.instruments import count_request
from db import logs
from db.ids import random_text

logger = logging.getLogger(__name__)
access = logging.getLogger("api.access")
_PROBES = ("/healthz", "/readyz", "/metrics")
_METER = "residency.body_meter"


@dataclass(frozen=True)
class BodyRules:
    """How large a body may be where no route allows more, how long it may pause, how fast it must come."""

    limit_bytes: int
    idle_s: float
    min_bytes_per_s: int


class BodyMeter:
    """Counts a body while it is read and stops it at `limit_bytes`, whatever its headers promised.

    A body is given up when it stands still, and when the time that was spent waiting for it is more than it
    takes at the least rate. Our own work on it does not count.
    """

    def __init__(self, receive: Receive, *, headers: Headers, rules: BodyRules) -> None:
        self._receive, self._rules = receive, rules
        self._ended, self._waited_s = False, 0.0
        declared = headers.get("content-length", "")
        self._declared_bytes = int(declared) if declared.isdecimal() else 0
        self._read_bytes = 0
        self.limit_bytes = rules.limit_bytes

    async def receive(self) -> Message:
        """The next message of the request. Raises ApiError (413) beyond the limit, (408) beyond the time."""
        if self._declared_bytes > self.limit_bytes:
            raise self._too_large()
        message = await (self._receive() if self._ended else self._receive_in_time())
        self._read_bytes += len(message.get("body", b""))
        if self._read_bytes > self.limit_bytes:
            raise self._too_large()
        return message

    async def _receive_in_time(self) -> Message:
        idle_s = self._rules.idle_s
        earned_s = self._read_bytes / self._rules.min_bytes_per_s
        started_s = time.perf_counter()
        try:
            async with asyncio.timeout(min(idle_s, idle_s + earned_s - self._waited_s)):
                message = await self._receive()
        except TimeoutError:
            text = f"The request body comes too slowly: {self._read_bytes} bytes so far."
            # Nobody will read the rest.
            raise ApiError(408, "request_timeout", text, headers={"connection": "close"}) from None
        self._waited_s += time.perf_counter() - started_s
        self._ended = not message.get("more_body", False)
        return message

    def _too_large(self) -> ApiError:
        message = f"The request body has more than the {self.limit_bytes} bytes allowed here."
        return ApiError(413, "request_too_large", message)


class RequestFrame:
    """Pure ASGI, so that streams stay streams."""

    def __init__(self, app: ASGIApp, *, rules: BodyRules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{random_text(24)}"
        with logs.bound(request_id=request_id):
            await self._serve(scope, receive, send, request_id=request_id)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, *, request_id: str) -> None:
        started_s = time.perf_counter()
        status: int | None = None
        meter = BodyMeter(receive, headers=Headers(scope=scope), rules=self._rules)
        scope[_METER] = meter

        async def send_framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - started_s) * 1000))
            await send(message)

        try:
            await self._app(scope, meter.receive, send_framed)
        except ClientDisconnect:
            logger.info("the client went away")
        except Exception:
            if status is not None:
                raise  # the server must cut the connection: the answer is not whole
            logger.exception("unexpected fault in %s %s", scope["method"], scope["path"])
            message = f"The server had an error while processing your request ({request_id})."
            await error_response(500, "server_error", message)(scope, receive, send_framed)
        finally:
            _account(scope, status, time.perf_counter() - started_s)


def _account(scope: Scope, status: int | None, took_s: float) -> None:
    """Count a request and write a line about it, by its route: anything may stand in its path."""
    route = route_of(scope)
    count_request(method=scope["method"], route=route, status=status, took_s=took_s)
    level = logging.DEBUG if route in _PROBES else logging.INFO
    told = {"method": scope["method"], "route": route, "status": status, "ms": round(took_s * 1000, 1)}
    access.log(level, "%s %s %s", scope["method"], route, status, extra={"fields": told})


def allow_body(request: Request, *, limit_bytes: int) -> None:
    """Change the bound on a body that nobody has read yet."""
    meter: BodyMeter = request.scope[_METER]
    meter.limit_bytes = limit_bytes


def route_of(scope: Scope) -> str | None:
    """The path of the route that a request found, with its parameters by their names."""
    path = getattr(scope.get("route"), "path", None)
    within = path is not None and scope["path"].startswith("/v1/") and not path.startswith("/v1/")
    return f"/v1{path}" if within else path
