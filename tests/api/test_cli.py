"""The command line against a small HTTP server that answers what a test tells it to."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from api.cli import app

JOB = {
    "id": "ftjob-1",
    "object": "fine_tuning.job",
    "created_at": 1700000000,
    "finished_at": None,
    "model": "base",
    "fine_tuned_model": None,
    "status": "running",
    "training_file": "file-1",
    "validation_file": None,
    "trained_tokens": None,
    "seed": 7,
    "hyperparameters": {"n_epochs": 3},
    "method": {"type": "supervised"},
    "error": None,
    "phase": "training",
    "progress": {"step": 1, "total_steps": 2, "tokens_per_s": 90.0, "eta_seconds": 61},
}
SUCCEEDED = JOB | {"status": "succeeded", "fine_tuned_model": "ft:base:x", "phase": None}
FILE = {
    "id": "file-1",
    "bytes": 2000,
    "created_at": 1700000000,
    "filename": "train.jsonl",
    "purpose": "fine-tune",
    "status": "uploaded",
    "status_details": None,
    "rows": None,
}
MODEL = {"id": "org/m", "created": 1700000000, "status": "importing", "digest": None, "details": None}


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


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
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

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    peer = Peer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("RESIDENCY_URL", peer.url)
    monkeypatch.setenv("RESIDENCY_API_KEY", "sk-test")
    monkeypatch.setattr("api.client.POLL_EVERY_S", 0.001)
    yield peer
    server.shutdown()
    server.server_close()
    thread.join()


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


# --- where and who ------------------------------------------------------------------------------------------


def test_it_starts_fast_and_without_the_server() -> None:
    heavy = ["torch", "sqlalchemy", "fastapi", "celery", "pydantic"]
    code = f"import sys, api.cli; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_no_server_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        monkeypatch.setenv("RESIDENCY_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        result = run("jobs", "list")
    assert result.exit_code == 1
    assert "residency up" in result.stderr
    assert result.stdout == ""


def test_a_url_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESIDENCY_URL", "localhost")
    result = run("jobs", "list")
    assert result.exit_code == 1
    assert "RESIDENCY_URL" in result.stderr


def test_an_error_body_is_one_line(peer: Peer) -> None:
    message = "unknown hyperparameter [bold]'x'[/bold] \x1b[2J"
    peer.answers("POST /v1/fine_tuning/jobs", error(400, message, param="method.x"))
    result = run("jobs", "create", "--model", "m", "--file", "file-1", "-p", "x=1")
    assert result.exit_code == 1
    assert result.stderr == "unknown hyperparameter [bold]'x'[/bold] [2J (method.x)\n"


@pytest.mark.parametrize(
    "answer", [Answer(b"<html>hello</html>"), Answer([]), Answer(b"<html>no</html>", 502), Answer({}, 418)]
)
def test_another_kind_of_server(peer: Peer, answer: Answer) -> None:
    peer.answers("GET /v1/models", answer)
    result = run("models", "list")
    assert result.exit_code == 1
    assert peer.url in result.stderr


def test_the_key_comes_from_the_home_folder(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "admin.key").write_text("sk-file\n")
    monkeypatch.delenv("RESIDENCY_API_KEY")
    monkeypatch.setenv("RESIDENCY_HOME", str(tmp_path))
    peer.answers("GET /v1/models", {"data": []})
    assert run("models", "list").exit_code == 0
    assert peer.requests[0].headers["authorization"] == "Bearer sk-file"


def test_the_key_of_this_machine_stays_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from api.client import connect

    (tmp_path / ".residency").mkdir()
    (tmp_path / ".residency" / "admin.key").write_text("sk-file\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RESIDENCY_API_KEY", "RESIDENCY_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RESIDENCY_URL", "http://127.0.0.1:1")
    assert connect().key == "sk-file"
    monkeypatch.setenv("RESIDENCY_URL", "http://elsewhere.example:8700")
    assert connect().key is None


def test_without_a_key_it_says_where_to_put_one(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RESIDENCY_API_KEY")
    monkeypatch.setenv("RESIDENCY_HOME", str(tmp_path))
    peer.answers("GET /v1/models", error(401, "No key."))
    result = run("models", "list")
    assert result.exit_code == 1
    assert "RESIDENCY_API_KEY" in result.stderr


# --- models and files ---------------------------------------------------------------------------------------


def test_import_waits_and_reports(peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    details = {"parameters": 134_515_008, "context_length": 8192, "bytes": 538_090_408}
    peer.answers("POST /v1/models/import", MODEL)
    peer.answers(
        "GET /v1/models/org%2Fm", MODEL, MODEL | {"status": "ready", "digest": "ab", "details": details}
    )
    result = run("models", "import", "m.gguf", "--id", "org/m")
    assert result.exit_code == 0
    assert peer.requests[0].json() == {"id": "org/m", "source": str(tmp_path / "m.gguf")}
    for said in ("135M", "8192", "538.1 MB", "ab"):
        assert said in result.stdout


def test_import_that_fails(peer: Peer) -> None:
    failed = MODEL | {
        "status": "failed",
        "error": {"code": "not_a_model", "message": "There is no config.json."},
    }
    peer.answers("POST /v1/models/import", MODEL)
    peer.answers("GET /v1/models/org%2Fm", failed)
    result = run("models", "import", "/x", "--id", "org/m")
    assert (result.exit_code, result.stderr) == (1, "There is no config.json.\n")


def test_upload_sends_the_file_and_waits(peer: Peer, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    peer.answers("POST /v1/files", FILE)
    peer.answers("GET /v1/files/file-1", FILE, FILE | {"status": "processed", "rows": 1})
    result = run("files", "upload", str(path))
    assert result.exit_code == 0
    assert result.stdout == "file-1  train.jsonl  2.0 kB  1 rows\n"
    assert path.read_bytes() in peer.requests[0].body
    assert b'filename="train.jsonl"' in peer.requests[0].body


def test_upload_shows_the_line_at_fault(peer: Peer, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    peer.answers("POST /v1/files", FILE)
    details = "Line 2: 'completion' is missing"
    peer.answers("GET /v1/files/file-1", FILE | {"status": "error", "status_details": details})
    result = run("files", "upload", str(path))
    assert result.exit_code == 1
    assert details in result.stderr
    assert '\n  {"prompt": 3}\n' in result.stderr


def test_upload_of_nothing(tmp_path: Path) -> None:
    assert run("files", "upload", str(tmp_path / "none.jsonl")).exit_code == 2


def test_lists_of_several_pages_as_json(peer: Peer) -> None:
    pages = ({"data": [FILE], "has_more": True}, {"data": [FILE | {"id": "file-2"}], "has_more": False})
    peer.answers("GET /v1/files", *pages)
    result = run("files", "list", "--json")
    assert [file["id"] for file in json.loads(result.stdout)] == ["file-1", "file-2"]
    assert "after=file-1" in peer.requests[1].path


@pytest.mark.parametrize(
    ("command", "route"),
    [("models", "models"), ("files", "files"), ("jobs", "fine_tuning/jobs"), ("deployments", "deployments")],
)
def test_empty_lists_print_nothing(peer: Peer, command: str, route: str) -> None:
    peer.answers(f"GET /v1/{route}", {"data": [], "has_more": False})
    result = run(command, "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "residency" in result.stderr


# --- jobs ---------------------------------------------------------------------------------------------------


def test_create_sends_the_hyperparameters(peer: Peer) -> None:
    peer.answers("POST /v1/fine_tuning/jobs", JOB)
    options = ["--epochs", "2", "--learning-rate", "1e-4", "-p", "lora_rank=16", "-p", "dtype=float32"]
    result = run("jobs", "create", "--model", "m", "--file", "file-1", "--suffix", "s", *options)
    assert result.stdout == "ftjob-1\n"
    hyperparameters = {"n_epochs": 2, "learning_rate": 1e-4, "lora_rank": 16, "dtype": "float32"}
    assert peer.requests[0].json() == {
        "model": "m",
        "training_file": "file-1",
        "suffix": "s",
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    }


@pytest.mark.parametrize("param", [["-p", "lora_rank"], ["-p", "=3"], ["--epochs", "2", "-p", "n_epochs=3"]])
def test_bad_params_are_usage_errors(peer: Peer, param: list[str]) -> None:
    result = run("jobs", "create", "--model", "m", "--file", "file-1", *param)
    assert result.exit_code == 2
    assert peer.requests == []


def event(number: int, message: str, **more: Any) -> dict[str, Any]:
    plain = {
        "id": f"ftevent-{number}",
        "created_at": 1700000000,
        "level": "info",
        "type": "message",
        "data": {},
    }
    return plain | {"message": message} | more


def events_page(*events: dict[str, Any]) -> dict[str, Any]:
    return {"data": list(events), "has_more": False}


def test_following_prints_each_event_once_until_the_end(peer: Peer) -> None:
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", JOB, JOB, SUCCEEDED)
    peer.answers(
        "GET /v1/fine_tuning/jobs/ftjob-1/events",
        events_page(event(1, "Created"), event(2, "Step 1", type="metrics", data={"train_loss": 2.0})),
        events_page(),
        events_page(event(3, "Done")),
    )
    result = run("jobs", "logs", "ftjob-1", "-f")
    assert result.exit_code == 0
    lines = [line.split("  ", 1)[-1] for line in result.stdout.splitlines() if line]
    assert lines == ["Created", "Step 1", "Done", "ftjob-1 succeeded: ft:base:x"]
    asked = [request.path for request in peer.requests if "/events" in request.path]
    assert all("order=asc" in path for path in asked)
    assert "after=ftevent-2" in asked[-1]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_following_a_job_that_does_not_succeed(peer: Peer, status: str) -> None:
    over = JOB | {"status": status, "error": {"code": "x", "message": "No space left."}}
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", over)
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1/events", events_page())
    result = run("jobs", "logs", "ftjob-1", "--follow")
    assert result.exit_code == 1
    assert f"ftjob-1 {status}: No space left." in result.stderr


def test_following_outlives_a_restart_of_the_server(peer: Peer) -> None:
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", JOB, error(503, "away"), SUCCEEDED)
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1/events", error(502, "away"), events_page())
    assert run("jobs", "logs", "ftjob-1", "-f").exit_code == 0


def test_logs_of_an_unknown_job(peer: Peer) -> None:
    peer.answers("GET /v1/fine_tuning/jobs/nope", error(404, "No such fine-tuning job: nope"))
    assert run("jobs", "logs", "nope", "-f").stderr == "No such fine-tuning job: nope\n"


def log(text: str, *, following: int, attempt: int = 1) -> Answer:
    return Answer(text.encode(), headers={"x-next-offset": str(following), "x-attempt": str(attempt)})


def test_raw_logs_are_read_to_the_end(peer: Peer) -> None:
    route = "GET /v1/fine_tuning/jobs/ftjob-1/logs"
    peer.answers(route, log("one\n", following=4), log("twö\n\x1b[2J", following=13), log("", following=13))
    result = run("jobs", "logs", "ftjob-1", "--raw")
    assert result.stdout == "one\ntwö\n[2J"
    assert [request.path.rpartition("=")[2] for request in peer.requests] == ["0", "4", "13"]


def test_raw_logs_of_a_new_attempt_start_again(peer: Peer) -> None:
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", JOB, SUCCEEDED)
    first = [log("one\n", following=4), log("", following=4)]
    second = [
        log("", following=4, attempt=2),
        log("two\n", following=4, attempt=2),
        log("", following=4, attempt=2),
    ]
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1/logs", *first, *second)
    result = run("jobs", "logs", "ftjob-1", "--raw", "-f")
    assert result.stdout.startswith("one\ntwo\n")
    assert result.exit_code == 0


def test_show_and_cancel(peer: Peer) -> None:
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", JOB)
    shown = run("jobs", "show", "ftjob-1").stdout
    for said in ("running", "training", "1/2, 1:01 left", "n_epochs"):
        assert said in shown
    assert json.loads(run("jobs", "show", "ftjob-1", "--json").stdout) == JOB
    peer.answers("POST /v1/fine_tuning/jobs/ftjob-1/cancel", JOB)
    assert run("jobs", "cancel", "ftjob-1").stdout.startswith("ftjob-1  running")


# --- deployments and chat -----------------------------------------------------------------------------------


def test_a_deployment_is_waited_for(peer: Peer) -> None:
    deployment = {"id": "dep-1", "model": "m", "status": "pending", "error": None, "created_at": 1700000000}
    peer.answers("POST /v1/deployments", deployment)
    peer.answers("GET /v1/deployments/dep-1", deployment, deployment | {"status": "ready"})
    assert run("deployments", "create", "m").stdout == "dep-1  m  ready\n"
    peer.answers(
        "GET /v1/deployments/dep-1", deployment | {"status": "failed", "error": {"message": "Too big."}}
    )
    result = run("deployments", "create", "m")
    assert (result.exit_code, result.stderr) == (1, "m could not be loaded: Too big.\n")


def sse(*frames: Any, done: bool = True) -> Answer:
    lines = [f"data: {json.dumps(frame)}\n\n" for frame in frames] + (["data: [DONE]\n\n"] if done else [])
    return Answer((": ping\n\n" + "".join(lines)).encode(), headers={"content-type": "text/event-stream"})


def delta(text: str | None, finish: str | None = None) -> dict[str, Any]:
    content = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish}]}


CHAT = "POST /v1/chat/completions"


def test_one_question_is_streamed(peer: Peer) -> None:
    peer.answers(CHAT, sse(delta(""), delta("Hel"), delta("lo\x1b[2J"), delta(None, "stop")))
    options = ["--system", "Be kind.", "--temperature", "0", "--max-tokens", "9"]
    result = run("chat", "m", "--message", "Hi", *options)
    assert result.stdout == "Hello[2J\n"
    assert peer.requests[0].json() == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        "temperature": 0,
        "max_completion_tokens": 9,
        "stream": True,
    }


def test_a_whole_answer(peer: Peer) -> None:
    choice = {"message": {"content": "Hello"}, "finish_reason": "length"}
    peer.answers(CHAT, {"choices": [choice]})
    result = run("chat", "m", "--message", "Hi", "--no-stream")
    assert result.stdout == "Hello\n"
    assert "token limit" in result.stderr


def test_a_model_that_loads_is_waited_for(peer: Peer) -> None:
    loading = error(503, "still loading", code="model_loading")
    loading.headers["retry-after"] = "0"
    peer.answers(CHAT, loading, sse(delta("Hello", "stop")))
    assert run("chat", "m", "--message", "Hi").stdout == "Hello\n"


@pytest.mark.parametrize(
    "answer", [sse(delta("Hel"), done=False), sse(delta("Hel"), {"error": {"message": "engine died"}})]
)
def test_an_answer_that_breaks_off_is_an_error(peer: Peer, answer: Answer) -> None:
    peer.answers(CHAT, answer)
    result = run("chat", "m", "--message", "Hi")
    assert result.exit_code == 1
    assert "broke off" in result.stderr


def test_a_conversation_remembers_and_survives_an_error(peer: Peer) -> None:
    hello, bye = sse(delta("Hello", "stop")), sse(delta("Bye", "stop"))
    peer.answers(CHAT, hello, error(400, "too long"), bye, hello)
    result = run("chat", "m", stdin="Hi\n\nagain\nbye\n/new\nHi\n")
    assert result.exit_code == 0
    assert result.stdout == "Hello\nBye\nHello\n"
    assert "too long" in result.stderr
    said = [[message["content"] for message in request.json()["messages"]] for request in peer.requests]
    assert said == [["Hi"], ["Hi", "Hello", "again"], ["Hi", "Hello", "bye"], ["Hi"]]


# --- up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--port", "0"], ["--port", "65536"], ["--workers", "0"]])
def test_up_refuses_what_cannot_be(arguments: list[str]) -> None:
    assert run("up", *arguments).exit_code == 2


def test_up_on_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "api.cli",
            "up",
            "--home",
            str(tmp_path / "home"),
            "--port",
            str(port),
        ]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert found.returncode == 1
    assert str(port) in found.stderr
