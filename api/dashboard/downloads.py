"""Files of the server, handed to the browser as they arrive: the key stays here, and no file in memory."""

from contextlib import AsyncExitStack

import httpx
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from api.dashboard import model_words, server
from api.dashboard.client import Refused, Trouble
from api.dashboard.frame import login_url
from api.dashboard.sessions import sessions

router = APIRouter()
# The disposition names the file; from the length browsers know how far they are.
_PASSED_ON = ("content-length", "content-disposition")


@router.get("/download/model")
async def download_model_file(request: Request, model: str, name: str) -> Response:
    """One file of a model."""
    key = sessions.key_of(request)
    if key is None:
        return RedirectResponse(login_url(request), status_code=303)
    stack = AsyncExitStack()
    try:
        upstream = await stack.enter_async_context(
            server.api(key).download(model_words.url_of(model, "files", name))
        )
    except Trouble as trouble:
        status = trouble.status if isinstance(trouble, Refused) else 503
        return PlainTextResponse(str(trouble), status_code=status)
    return _Passing(upstream, stack)


class _Passing(StreamingResponse):
    """A body on its way; the connection it comes from ends with it, also when the browser leaves early."""

    def __init__(self, upstream: httpx.Response, stack: AsyncExitStack) -> None:
        headers = {name: upstream.headers[name] for name in _PASSED_ON if name in upstream.headers}
        # Named, so that nothing on the way compresses weights, which takes long and gains nothing.
        headers["content-encoding"] = "identity"
        super().__init__(upstream.aiter_bytes(), media_type="application/octet-stream", headers=headers)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with self._stack:
            await super().__call__(scope, receive, send)
