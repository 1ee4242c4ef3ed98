"""What the API writes about requests: a JSON object a line, by the id that the client has, and no secret."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from db.logs import JsonFormatter, TextFormatter

Lines = io.StringIO


@pytest.fixture
def handler() -> Iterator[logging.StreamHandler[Lines]]:
    """Hears all loggers, as stderr would."""
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(JsonFormatter())
    root, access = logging.getLogger(), logging.getLogger("api.access")
    root.addHandler(handler)
    access.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    access.setLevel(logging.NOTSET)


def read(handler: logging.StreamHandler[Lines], logger: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in handler.stream.getvalue().splitlines()]
    return [line for line in lines if line["logger"] == logger]


def test_a_request_is_one_line_with_its_id_and_route(client, handler) -> None:
    answer = client.get("/v1/fine_tuning/jobs/ftjob-gone")
    [line] = read(handler, "api.access")
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["method"], line["status"], line["level"]) == ("GET", 404, "info")
    assert line["route"] == "/v1/fine_tuning/jobs/{job_id}"
    assert 0 < line["ms"] < 60_000
    assert line["time"].endswith("+00:00")


def test_what_users_wrote_into_addresses_and_headers_is_in_no_line(client, world, handler) -> None:
    secret = world.user.split("_")[3]
    client.get("/v1/models", params={"key": world.user})
    client.get(f"/v1/files/{world.user}")
    client.get(f"/nowhere/{world.user}")
    client.post("/v1/chat/completions", json={"model": world.user})
    assert len(read(handler, "api.access")) == 4
    assert secret not in handler.stream.getvalue()


def test_a_fault_is_one_line_with_its_exception_and_the_id(client, world, handler) -> None:
    world.settings.blobs_dir.mkdir(parents=True)
    (world.settings.blobs_dir / "incoming").touch()  # where a folder is expected
    answer = client.put("/v1/files", params={"filename": "a", "purpose": "batch"}, content=b"x")
    [fault] = read(handler, "api.middleware")
    assert answer.status_code == 500
    assert fault["request_id"] == answer.headers["x-request-id"]
    assert fault["exception"].splitlines()[-1].startswith("FileExistsError")
    [access] = read(handler, "api.access")
    assert (access["status"], access["request_id"]) == (500, fault["request_id"])


def test_probes_are_not_worth_a_line(client, handler) -> None:
    client.get("/healthz")
    assert read(handler, "api.access") == []


def test_people_read_the_same_as_text(client, handler) -> None:
    handler.setFormatter(TextFormatter())
    answer = client.get("/v1/models")
    [line] = handler.stream.getvalue().splitlines()
    assert "INFO    api.access: GET /v1/models 200 [request_id=" in line
    assert answer.headers["x-request-id"] in line
