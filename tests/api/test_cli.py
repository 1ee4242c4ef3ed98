"""The command line: where the server is, models, files, and starting the service."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from api.client import connect
from db import keys
from db.session import Database
from tests.api.cli_peer import Answer, Peer, error, run, serve

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


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    with serve() as peer:
        monkeypatch.setenv("RESIDENCY_URL", peer.url)
        monkeypatch.setenv("RESIDENCY_API_KEY", "sk-test")
        monkeypatch.setattr("api.client.POLL_EVERY_S", 0.001)
        yield peer


# --- where and who ------------------------------------------------------------------------------------------


def test_it_starts_fast_and_without_the_server() -> None:
    heavy = ["torch", "sqlalchemy", "fastapi", "celery", "pydantic", "yaml"]
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


def test_import_of_an_adapter_from_a_hub(peer: Peer) -> None:
    peer.answers("POST /v1/models/import", MODEL)
    peer.answers("GET /v1/models/org%2Fm", MODEL | {"status": "ready"})
    result = run("models", "import", "hf://org/adapter@v1", "--id", "org/m", "--base", "org/base")
    assert result.exit_code == 0
    expected = {"id": "org/m", "source": "hf://org/adapter@v1", "base": "org/base"}
    assert peer.requests[0].json() == expected


def test_adapters_in_order(peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    peer.answers("POST /v1/models/import", MODEL)
    peer.answers("GET /v1/models/org%2Fm", MODEL | {"status": "ready"})
    result = run("models", "import", "ftjob-1", "--id", "org/m", "--base", "org/base", "--then", "second")
    assert result.exit_code == 0
    expected = {"id": "org/m", "adapters": ["ftjob-1", str(tmp_path / "second")], "base": "org/base"}
    assert peer.requests[0].json() == expected


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
    peer.answers("PUT /v1/files", FILE)
    peer.answers("GET /v1/files/file-1", FILE, FILE | {"status": "processed", "rows": 1})
    said = ["--format", "prompt_completion", "--column", "prompt=Frage", "--max-invalid-fraction", "0.01"]
    result = run("files", "upload", str(path), *said)
    assert result.exit_code == 0
    assert result.stdout == "file-1  train.jsonl  2.0 kB  1 rows\n"
    sent = peer.requests[0]
    assert sent.body == path.read_bytes()
    query = dict(parse_qsl(urlsplit(sent.path).query))
    assert query == {
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "sha256": hashlib.sha256(sent.body).hexdigest(),
        "format": "prompt_completion",
        "column_map": '{"prompt": "Frage"}',
        "max_invalid_fraction": "0.010000000",
    }


def test_upload_shows_the_line_at_fault(peer: Peer, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    peer.answers("PUT /v1/files", FILE)
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


def test_into_a_pipe_every_row_is_a_line(peer: Peer) -> None:
    file = FILE | {"id": "file-" + "x" * 60, "filename": "y" * 200}
    peer.answers("GET /v1/files", {"data": [file, file], "has_more": False})
    lines = run("files", "list").stdout.splitlines()
    assert len(lines) == 3
    assert all(file["id"] in line and file["filename"] in line for line in lines[1:])


@pytest.mark.parametrize(
    ("command", "route"),
    [("models", "models"), ("files", "files"), ("jobs", "fine_tuning/jobs"), ("deployments", "deployments")],
)
def test_empty_lists_print_nothing(peer: Peer, command: str, route: str) -> None:
    peer.answers(f"GET /v1/{route}", {"data": [], "has_more": False})
    result = run(command, "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "residency" in result.stderr


# --- migrate ------------------------------------------------------------------------------------------------


def test_migrate_readies_a_database_and_keeps_a_key_that_works(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "residency_key_pepper").write_text("p" * 32 + "\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RESIDENCY_")} | {
        "RESIDENCY_HOME": str(tmp_path),
        "RESIDENCY_SECRETS_DIR": str(tmp_path / "secrets"),
    }
    key_file = tmp_path / "first.key"
    command = [sys.executable, "-m", "api.cli", "migrate", "--key-file", str(key_file)]
    subprocess.run(command, env=env, check=True)
    key = key_file.read_text()
    assert key_file.stat().st_mode & 0o777 == 0o600
    subprocess.run(command, env=env, check=True)
    assert key_file.read_text() == key
    database = Database(f"sqlite:///{tmp_path / 'residency.db'}")
    with database.read() as session:
        caller = keys.authenticate(session, key.strip(), pepper="p" * 32)
    database.dispose()
    assert caller is not None
    assert (caller.org_id, caller.role) == (keys.DEFAULT_ORG_ID, "admin")


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
