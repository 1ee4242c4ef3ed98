"""The client's blind retries, through a proxy that loses or refuses the first answer."""

import http.client
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import openai
from openai import OpenAI

from .context import ROWS, Context, waiting_job


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on. The first POST goes wrong: `lost` after it was carried out, or `busy` before."""

    daemon_threads = True

    def __init__(self, upstream: str, fault: str) -> None:
        super().__init__(("127.0.0.1", 0), _FaultyHandler)
        self.upstream = urlsplit(upstream)
        self.fault: str | None = fault
        self.retry_counts: list[str] = []  # of POSTs, as the client tells them

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{self.upstream.path}"


class _FaultyHandler(BaseHTTPRequestHandler):
    server: FaultyProxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._pass_on(None)

    def do_POST(self) -> None:
        fault, self.server.fault = self.server.fault, None
        self.server.retry_counts.append(self.headers["x-stainless-retry-count"])
        self._pass_on(fault)

    def _pass_on(self, fault: str | None) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if fault == "busy":
            return self._answer(503, b'{"error": {"message": "busy"}}', {"retry-after": "1"})
        upstream = http.client.HTTPConnection(self.server.upstream.netloc, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault == "lost":
            self.close_connection = True
            return None
        return self._answer(answer.status, content, {"content-type": answer.headers["content-type"]})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_words: Any) -> None:
        pass


@contextmanager
def faulty(client: OpenAI, fault: str) -> Iterator[tuple[OpenAI, FaultyProxy]]:
    """The client behind a `FaultyProxy`."""
    with FaultyProxy(str(client.base_url).rstrip("/"), fault) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        with client.with_options(base_url=proxy.url, http_client=openai.DefaultHttpxClient()) as behind:
            yield behind, proxy
        proxy.shutdown()


def check_lost_answer_makes_one_job(client: OpenAI, context: Context) -> None:
    label = {"label": uuid.uuid4().hex}
    with faulty(client, "lost") as (behind, proxy), waiting_job(behind, context, metadata=label) as job:
        assert proxy.retry_counts == ["0", "1"]
        assert [each.id for each in client.fine_tuning.jobs.list() if each.metadata == label] == [job.id]
        with waiting_job(client, context, metadata=label) as meant:  # not a retry: two are wanted
            assert meant.id != job.id


def check_lost_answer_makes_one_file(client: OpenAI, _context: Context) -> None:
    name = f"{uuid.uuid4().hex}.jsonl"
    with faulty(client, "lost") as (behind, proxy):
        file = behind.files.create(file=(name, ROWS), purpose="fine-tune")
        assert proxy.retry_counts == ["0", "1"]
    assert [each.id for each in client.files.list() if each.filename == name] == [file.id]
    client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=60)
    client.files.delete(file.id)


def check_busy_server_is_asked_again(client: OpenAI, context: Context) -> None:
    started = time.monotonic()
    with faulty(client, "busy") as (behind, proxy), waiting_job(behind, context) as job:
        assert time.monotonic() - started >= 1
        assert proxy.retry_counts == ["0", "1"]
        assert job.status == "queued"
