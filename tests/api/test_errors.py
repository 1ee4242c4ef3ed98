"""Every refusal and every fault in OpenAI's shape, with an id to ask about."""

import subprocess
import sys
import zlib

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from api.settings import ApiSettings
from db.session import Database

JOBS = "/v1/fine_tuning/jobs"


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    assert int(response.headers["openai-processing-ms"]) >= 0
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


def test_unknown_route(client):
    error = error_of(client.get("/v1/nothing"), 404)
    assert error["message"] == "Invalid URL (GET /v1/nothing)"
    assert error["type"] == "invalid_request_error"


def test_trailing_slash_is_another_route(client):
    error_of(client.get("/v1/files/"), 404)


def test_wrong_method(client):
    assert error_of(client.patch("/v1/files"), 405)["code"] == "method_not_supported"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b'{"model": ', "invalid_json", None),
        (b"[1]", "invalid_value", None),
        (b"\xff\xfe", None, None),
        (b"{}", "missing_required_parameter", "model"),
        (b'{"model": "m"}', "missing_required_parameter", "training_file"),
        (b'{"model": "m", "training_file": 7}', "invalid_value", "training_file"),
        (b'{"model": "m", "training_file": "f", "epochs": 3}', "unknown_parameter", "epochs"),
        (b'{"model": "m", "training_file": "f", "seed": "1"}', "invalid_value", "seed"),
        (b'{"model": "m", "training_file": "f", "suffix": "a b"}', "invalid_value", "suffix"),
        (
            b'{"model": "m", "training_file": "f", "resources": {"nproc_per_node": 0}}',
            "invalid_value",
            "resources.nproc_per_node",
        ),
        (b'{"model": "m", "training_file": "f", "metadata": {"a": 1}}', "invalid_value", "metadata.a"),
        (b'{"model": "m\\u0000", "training_file": "f"}', "invalid_value", None),
        (b'{"model": "\\ud800", "training_file": "f"}', "invalid_value", None),
        (b'{"model": "m", "training_file": "f", "\\ud800": 1}', "invalid_value", None),
        (b'{"model": "m", "training_file": "f", "method": ' + b'{"a":' * 99 + b"1" + b"}" * 100, None, None),
        (b"[" * 100_000, None, None),
    ],
)
def test_bad_bodies_are_400(client, body, code, param):
    answer = client.post(JOBS, content=body, headers={"content-type": "application/json"})
    error = error_of(answer, 400)
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code


def test_what_no_database_takes_is_told(client):
    answer = client.post(JOBS, json={"model": "m\0", "training_file": "f"})
    assert "without NUL characters" in error_of(answer, 400)["message"]


def test_a_slip_in_a_body_that_may_be_left_out(client):
    answer = client.post(f"{JOBS}/ftjob-x/retry", json={"hyperparameter": {}})
    assert "Did you mean 'hyperparameters'?" in error_of(answer, 400)["message"]


def test_json_without_its_content_type(client):
    error = error_of(client.post(JOBS, content=b"{}", headers={"content-type": "text/plain"}), 400)
    assert "application/json" in error["message"]


def test_bad_query(client):
    error = error_of(client.get("/v1/files?limit=0"), 400)
    assert (error["code"], error["param"]) == ("invalid_value", "limit")


def test_body_over_the_limit(client, settings):
    body = b'{"model": "' + b"m" * settings.max_body_bytes + b'"}'
    headers = {"content-type": "application/json"}
    assert error_of(client.post(JOBS, content=body, headers=headers), 413)["code"] == "request_too_large"
    chunks = (body[start : start + 65536] for start in range(0, len(body), 65536))
    assert error_of(client.post(JOBS, content=chunks, headers=headers), 413)["code"] == "request_too_large"


@pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
def test_ids_that_cannot_exist(client):
    for path in ("/v1/files/%00", f"{JOBS}/%00", "/v1/models/a%00", "/v1/files?after=%00"):
        answer = client.get(path)
        assert answer.status_code in (400, 404), answer.text
        error_of(answer, answer.status_code)


def test_unexpected_fault_tells_nothing_but_its_id(client, world):
    world.settings.blobs_dir.mkdir(parents=True)
    (world.settings.blobs_dir / "incoming").touch()  # where a folder is expected
    answer = client.put("/v1/files", params={"filename": "a", "purpose": "batch"}, content=b"x")
    error = error_of(answer, 500)
    assert (error["type"], error["code"]) == ("server_error", "server_error")
    assert answer.headers["x-request-id"] in error["message"]
    assert str(world.settings.home_dir) not in answer.text


def test_database_away_is_503_with_a_hint(settings: ApiSettings, tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'no folder' / 'x.db'}")
    client = TestClient(create_app(settings, database))  # without its start, which would fail
    body = "rsd_user_" + "a" * 12 + "_" + "b" * 43
    key = f"{body}_{zlib.crc32(body.encode()):08x}"  # well-formed, so that it is looked up
    answer = client.get("/v1/files", headers={"authorization": f"Bearer {key}"})
    assert error_of(answer, 503)["code"] == "database_unavailable"
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert "sqlite" not in answer.text


def test_request_ids_differ(client):
    ids = {client.get("/healthz").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_no_torch_in_the_api():
    heavy = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
    code = f"import api.main, sys; assert not [name for name in {heavy!r} if name in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True)
