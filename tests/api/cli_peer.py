"""A small HTTP server that answers what a test tells it to, and the command line pointed at it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from typer.testing import CliRunner, Result

from api.cli import app


@dataclass
class Answer:
    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    path: str
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Peer:
    """Answers a route with what was queued for it, the last answer again and again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Request] = []
        self._answers: dict[str, list[Answer]] = {}

    def answers(self, route: str, *answers: Any) -> None:
        """`route` is like `GET /v1/files`; a query is not part of it."""
        self._answers[route] = [item if isinstance(item, Answer) else Answer(item) for item in answers]

    def answer(self, method: str, request: Request) -> Answer:
        self.requests.append(request)
        queue = self._answers.get(f"{method} {request.path.partition('?')[0]}")
        if not queue:
            return error(404, f"Invalid URL ({method} {request.path})")
        return queue.pop(0) if len(queue) > 1 else queue[0]


def error(status: int, message: str, **more: Any) -> Answer:
    return Answer({"error": {"message": message, "type": "x", "param": None, "code": None} | more}, status)


@contextmanager
def serve() -> Iterator[Peer]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            answer = peer.answer(self.command, Request(self.path, self.headers, body))
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    peer = Peer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield peer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)
