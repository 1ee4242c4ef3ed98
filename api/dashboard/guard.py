"""What surrounds every request of the dashboard: only its own pages ask, and they load from here alone."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

# Vue compiles the templates of its components in the browser, hence unsafe-eval.
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
}


class Guard:
    """Refuses what pages of other origins send, sockets too, and tells browsers what ours may load."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if not _is_own(scope):
            refusal = (
                WebSocketClose(1008)
                if scope["type"] == "websocket"
                else PlainTextResponse("Requests of other sites are refused.", status_code=403)
            )
            await refusal(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _is_own(scope: Scope) -> bool:
    """Whether the page that asks is one of this host. A followed link is, too: it only reads."""
    headers = Headers(scope=scope)
    origin = headers.get("origin")
    if origin is not None:
        return urlsplit(origin).netloc == headers.get("host")
    reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
    return reads or headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
