"""What surrounds every request: its id, its clock, the bound on its body, the last net under its faults."""

import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError, error_response
from db.ids import random_text

logger = logging.getLogger(__name__)
_METER = "residency.body_meter"


class BodyMeter:
    """Counts a body while it is read and stops it at `limit_bytes`, whatever its headers promised."""

    def __init__(self, receive: Receive, *, headers: Headers, limit_bytes: int) -> None:
        self._receive = receive
        declared = headers.get("content-length", "")
        self._declared_bytes = int(declared) if declared.isdecimal() else 0
        self._read_bytes = 0
        self.limit_bytes = limit_bytes

    async def receive(self) -> Message:
        """The next message of the request. Raises ApiError (413) beyond the limit."""
        if self._declared_bytes > self.limit_bytes:
            raise self._too_large()
        message = await self._receive()
        self._read_bytes += len(message.get("body", b""))
        if self._read_bytes > self.limit_bytes:
            raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        message = f"The request body has more than the {self.limit_bytes} bytes allowed here."
        return ApiError(413, "request_too_large", message)


class RequestFrame:
    """Pure ASGI, so that streams stay streams."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{random_text(24)}"
        started_s = time.perf_counter()
        answered = False
        meter = BodyMeter(receive, headers=Headers(scope=scope), limit_bytes=self._max_body_bytes)
        scope[_METER] = meter

        async def send_framed(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - started_s) * 1000))
            await send(message)

        try:
            await self._app(scope, meter.receive, send_framed)
        except ClientDisconnect:
            logger.info("%s: the client went away", request_id)
        except Exception:
            if answered:
                raise  # the server must cut the connection: the answer is not whole
            logger.exception("%s: unexpected fault in %s %s", request_id, scope["method"], scope["path"])
            message = f"The server had an error while processing your request ({request_id})."
            await error_response(500, "server_error", message)(scope, receive, send_framed)


def allow_body(request: Request, *, limit_bytes: int) -> None:
    """Change the bound on a body that nobody has read yet."""
    meter: BodyMeter = request.scope[_METER]
    meter.limit_bytes = limit_bytes
