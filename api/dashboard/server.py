"""The one server that this dashboard shows."""

import httpx

from api.dashboard.client import Api, connect

_connections: dict[str, httpx.AsyncClient] = {}
_urls: list[str] = []


def choose(url: str) -> None:
    """Say which server it is, once, before any page is asked for."""
    _urls[:] = [url]


def url() -> str:
    """Its address, without /v1."""
    return _urls[0]


def api(key: str) -> Api:
    """The API under a key."""
    if url() not in _connections:
        _connections[url()] = connect(url())
    return Api(_connections[url()], key)


async def close() -> None:
    """Let go of all connections."""
    while _connections:
        _, http = _connections.popitem()
        await http.aclose()
