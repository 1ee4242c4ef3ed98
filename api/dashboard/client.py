"""The HTTP API as the pages use it: one key, one server, errors whose message may be shown as it is."""

import ipaddress
import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn
from urllib.parse import quote

import httpx

from api.connections import Client

# A page waits for its data; what takes longer than this is told rather than waited for.
_TIMEOUT = httpx.Timeout(20.0, connect=3.0)
# An answer may have to wait for its model to load, an upload for its file.
_LONG = httpx.Timeout(600.0, connect=3.0)


class Trouble(Exception):
    """Why something did not work, in a sentence for whoever looks at the page."""


class Unreachable(Trouble):
    """No server answered, or its answer broke off."""


class Refused(Trouble):
    """The server answered with an error: HTTP status, code and the parameter at fault where known."""

    def __init__(
        self, message: str, *, status: int, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def connect(url: str) -> httpx.AsyncClient:
    """The connections that all pages share. A proxy set for the internet has no way to this machine."""
    return Client(base_url=url.rstrip("/"), timeout=_TIMEOUT, trust_env=not _is_loopback(url))


def locate(*parts: str) -> str:
    """The path of a resource under /v1; ids may hold slashes and colons."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


class Api:
    """One server under one key. Every method raises `Refused` or `Unreachable`."""

    def __init__(self, http: httpx.AsyncClient, key: str) -> None:
        self._http = http
        self._headers = {"authorization": f"Bearer {key}"}
        # As the key says; what it may do is for the server to judge.
        self.is_admin = key.startswith("rsd_admin_")

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        """The JSON object at `path`; parameters that are None are left out."""
        return await self._object("GET", path, params=_given(params))

    async def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a JSON body; members that are None are left out."""
        return await self._object("POST", path, json=None if body is None else _given(body))

    async def delete(self, path: str) -> dict[str, Any]:
        """The answer to a DELETE."""
        return await self._object("DELETE", path)

    async def list_all(self, path: str, *, at_most: int = 1000, **params: Any) -> list[dict[str, Any]]:
        """The objects of every page of a list, at most `at_most` of them."""
        found: list[dict[str, Any]] = []
        while True:
            page = await self.get(path, **params)
            found += page["data"]
            if not page.get("has_more") or not page["data"] or len(found) >= at_most:
                return found[:at_most]
            params["after"] = page["data"][-1]["id"]

    async def get_bytes(self, path: str, **params: Any) -> tuple[bytes, httpx.Headers]:
        """A body that is not JSON, with its headers."""
        async with self._stream("GET", path, params=_given(params)) as response:
            return await response.aread(), response.headers

    @asynccontextmanager
    async def download(self, path: str) -> AsyncIterator[httpx.Response]:
        """A body of any size, read with `aiter_bytes`."""
        async with self._stream("GET", path, timeout=_LONG) as response:
            yield response

    async def upload(
        self, path: str, chunks: AsyncIterable[bytes], *, size_bytes: int, **params: Any
    ) -> dict[str, Any]:
        """The answer to a plain body of `size_bytes`, such as `PUT /v1/files`, sent as it is read."""
        headers = {"content-length": str(size_bytes), "content-type": "application/octet-stream"}
        return await self._object(
            "PUT", path, params=_given(params), content=chunks, headers=headers, timeout=_LONG
        )

    async def stream_sse(
        self, path: str, body: dict[str, Any] | None = None, *, last_event_id: str | None = None
    ) -> AsyncGenerator[tuple[str | None, dict[str, Any]]]:
        """(id, data) of each frame until `[DONE]`; a GET, or with a body a POST.

        Leave it early with `contextlib.aclosing`: that closes the connection, which ends the work.
        """
        method = "GET" if body is None else "POST"
        headers = {"last-event-id": last_event_id} if last_event_id else {}
        sent = None if body is None else _given(body)
        async with self._stream(method, path, json=sent, headers=headers, timeout=_LONG) as response:
            event_id: str | None = None
            async for line in response.aiter_lines():
                field, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if field == "id":
                    event_id = value
                elif field == "data":
                    if value == "[DONE]":
                        return
                    yield event_id, _frame(value)

    async def _object(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        async with self._stream(method, path, **options) as response:
            body = await response.aread()
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Refused(
                f"{self._http.base_url} does not answer like a Residency server.", status=response.status_code
            )
        return answer

    @asynccontextmanager
    async def _stream(self, method: str, path: str, **options: Any) -> AsyncIterator[httpx.Response]:
        options["headers"] = self._headers | options.pop("headers", {})
        url = self._http.base_url
        try:
            async with self._http.stream(method, path, **options) as response:
                if not response.is_success:
                    await response.aread()
                    _refuse(response)
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise Unreachable(
                f"No server answers at {url}. Start one with `residency up`, or start the dashboard with "
                "`--api-url` and the address where it runs."
            ) from None
        except httpx.TimeoutException:
            raise Unreachable(f"The server at {url} takes too long to answer.") from None
        except httpx.TransportError as error:
            raise Unreachable(f"The connection to {url} broke: {error}") from None


def _refuse(response: httpx.Response) -> NoReturn:
    try:
        error = response.json()["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        # Not ours: a proxy in between, or another service behind the port.
        message = f"The server at {response.url.host} answered with HTTP {response.status_code}."
        code = param = None
    raise Refused(message, status=response.status_code, code=code, param=param)


def _frame(text: str) -> dict[str, Any]:
    data = json.loads(text)
    if data.get("error"):  # a stream that failed on its way tells so in a frame
        error = data["error"]
        raise Refused(str(error.get("message")), status=200, code=error.get("code"))
    return data


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
