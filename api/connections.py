"""HTTP connections to our own services, with every lost connection told as one."""

from typing import Any

import httpx


class Client(httpx.AsyncClient):
    """httpx's client, but for a connection that is reset as soon as it stands.

    anyio asks the socket for its peer, and uvloop has no socket any more by then, so an AttributeError comes
    where callers wait for a `httpx.ConnectError`: nothing of the request was sent. Seen with anyio 4.16,
    httpcore 1.0.9 and uvloop 0.23.
    """

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """The answer; no connection, or one that breaks, raises `httpx.TransportError` alone."""
        try:
            return await super().send(request, **options)
        except AttributeError as error:
            if error.name != "getpeername":
                raise
            raise httpx.ConnectError("The connection was reset.", request=request) from error
