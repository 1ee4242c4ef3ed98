"""The HTTP client of the command line: where the server is, which key to show, what its errors say."""

import ipaddress
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

DEFAULT_URL = "http://127.0.0.1:8700"
DEFAULT_HOME = "~/.residency"
POLL_EVERY_S = 0.5
# As the official SDK: connecting is quick or hopeless, an answer may wait for a model to load.
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)


class ClientError(Exception):
    """Something the user has to be told in one sentence."""


class Unreachable(ClientError):
    """No server answered."""


class Refused(ClientError):
    """The server answered with an error: HTTP status, code and the parameter at fault where known."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after_s = retry_after_s


class Client:
    """A connection to one server. Every method raises `Refused` or `Unreachable`."""

    def __init__(self, base_url: str, *, key: str | None) -> None:
        self._base_url = base_url
        self.key = key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A proxy set for the internet has no way to this machine.
        self._http = httpx.Client(
            base_url=base_url, headers=headers, timeout=_TIMEOUT, trust_env=not _is_loopback(base_url)
        )

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """The JSON object at `path`; parameters that are None are left out."""
        return self._object("GET", path, params=_given(params))

    def post(self, path: str, /, **body: Any) -> dict[str, Any]:
        """The answer to a JSON body; members that are None are left out."""
        return self._object("POST", path, json=_given(body))

    def put_bytes(
        self, path: str, chunks: Iterable[bytes], *, size_bytes: int, **params: str
    ) -> dict[str, Any]:
        """The answer to a body of `size_bytes` that is sent as it is read."""
        headers = {"content-length": str(size_bytes), "content-type": "application/octet-stream"}
        return self._object("PUT", path, params=params, content=chunks, headers=headers)

    def delete(self, path: str) -> dict[str, Any]:
        """The answer to a DELETE."""
        return self._object("DELETE", path)

    def list_all(self, path: str, **params: Any) -> list[dict[str, Any]]:
        """The objects of every page of a list."""
        found: list[dict[str, Any]] = []
        while True:
            page = self.get(path, **params)
            found += page["data"]
            if not page.get("has_more") or not page["data"]:
                return found
            params["after"] = page["data"][-1]["id"]

    def get_bytes(self, path: str, **params: Any) -> tuple[bytes, httpx.Headers]:
        """A body that is not JSON, with its headers."""
        response = self._send("GET", path, params=_given(params))
        return response.content, response.headers

    def download(self, path: str, target: Path) -> int:
        """Write a body of any size to the file `target`, whole or not at all; its bytes."""
        partial = target.with_name(target.name + ".part")
        try:
            with (
                self._translated(),
                self._http.stream("GET", path) as response,
                partial.open("wb") as out,
            ):
                if response.is_error:
                    response.read()
                    raise self._refusal(response)
                for chunk in response.iter_bytes():
                    out.write(chunk)
                size_bytes = out.tell()
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return size_bytes

    @contextmanager
    def stream(self, path: str, **body: Any) -> Iterator[Iterator[str]]:
        """The lines of a streamed answer. Leaving the context closes the connection, which ends the work."""
        with (
            self._translated(),
            self._http.stream("POST", path, json=_given(body)) as response,
        ):
            if response.is_error:
                response.read()
                raise self._refusal(response)
            yield response.iter_lines()

    def _object(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        response = self._send(method, path, **arguments)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Refused(
                f"{self._base_url} does not answer like a Residency server.", status=response.status_code
            )
        return answer

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        with self._translated():
            response = self._http.request(method, path, **arguments)
        if not response.is_success:
            raise self._refusal(response)
        return response

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise ClientError(f"RESIDENCY_URL is not a URL of a server: {self._base_url}") from None
        except httpx.ConnectError:
            raise Unreachable(
                f"No server answers at {self._base_url}. "
                "Start one with `residency up`, or set RESIDENCY_URL to where it runs."
            ) from None
        except httpx.TimeoutException:
            raise Unreachable(f"The server at {self._base_url} takes too long to answer.") from None
        except httpx.TransportError as error:
            raise Unreachable(f"The connection to {self._base_url} broke: {error}") from None

    def _refusal(self, response: httpx.Response) -> Refused:
        try:
            error = response.json()["error"]
            message, code, param = str(error["message"]), error.get("code"), error.get("param")
        except (ValueError, KeyError, TypeError, AttributeError):
            # Not ours: a proxy in between, or another service behind the port.
            text = response.text.strip()[:200]
            message, code, param = f"HTTP {response.status_code} from {response.url}: {text}", None, None
        if response.status_code == 401 and self.key is None:
            message += " Set RESIDENCY_API_KEY, or RESIDENCY_HOME to the server's home folder."
        try:
            retry_after_s = float(response.headers.get("retry-after", ""))
        except ValueError:
            retry_after_s = None
        return Refused(
            message, status=response.status_code, code=code, param=param, retry_after_s=retry_after_s
        )


def connect() -> Client:
    """A client as the environment describes it: RESIDENCY_URL, RESIDENCY_API_KEY, RESIDENCY_HOME."""
    url = os.environ.get("RESIDENCY_URL") or DEFAULT_URL
    return Client(url.rstrip("/"), key=os.environ.get("RESIDENCY_API_KEY") or _read_key_file(url))


def locate(*parts: str) -> str:
    """The path of a resource under /v1; ids may hold slashes and colons."""
    return "/v1/" + "/".join(part if index == 0 else quote(part, safe="") for index, part in enumerate(parts))


def poll(fetch: Callable[[], dict[str, Any]], *, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Fetch an object until it is as wanted, and return it."""
    while True:
        found = fetch()
        if until(found):
            return found
        time.sleep(POLL_EVERY_S)


def _read_key_file(url: str) -> str | None:
    home = os.environ.get("RESIDENCY_HOME")
    # The key of this machine's own server is not for others, unless the user says which home to take it from.
    if home is None and not _is_loopback(url):
        return None
    path = Path(home or DEFAULT_HOME).expanduser() / "admin.key"
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ClientError(f"The key in {path} cannot be read: {error.strerror}") from None


def _is_loopback(url: str) -> bool:
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
