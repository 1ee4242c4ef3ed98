"""Default deny: every route of the OpenAPI document, with every kind of wrong key."""

import re

import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from api.auth import authenticate
from api.main import create_app
from api.metrics import require_scraper
from db import keys
from db.models import ApiKey

PUBLIC = {"/healthz", "/readyz", "/dashboard", "/openapi.json"}
PUBLIC |= {"/docs", "/docs/assets"}
VOTE = {
    "prompt": [{"role": "user", "content": "Hi"}],
    "chosen": {"model": "a", "content": "Hello"},
    "rejected": {"model": "b", "content": "No"},
}
# Queries without which a route is not asked anything.
NEEDED = {f"/v1/files/{{file_id}}/{kind}": {"model": "org/base"} for kind in ("preview", "tokens")}


def routes(app):
    """Every (method, path) of the app, with ids filled in."""
    for path, operations in app.openapi()["paths"].items():
        for method in operations:
            yield method.upper(), re.sub(r"\{\w+\}", "some-id", path)


def test_the_public_list(client):
    public = {str(context.path) for context in iter_route_contexts(client.app.routes)}
    assert {path for path in public if not path.startswith("/v1/")} == PUBLIC | {"/metrics"}


def test_a_route_cannot_forget_the_key(client):
    """Besides what each route asks for itself, the one router above all of them asks."""
    for context in iter_route_contexts(client.app.routes):
        if context.path not in PUBLIC:
            asks = require_scraper if context.path == "/metrics" else authenticate
            assert asks in [dependency.dependency for dependency in context.dependencies], context.path


@pytest.fixture
def wrong_keys(world):
    with world.database.write() as session:
        expired = keys.create(session, org_id="org-default", name="e", role="admin", pepper="p" * 32)
        revoked = keys.create(session, org_id="org-default", name="r", role="admin", pepper="p" * 32)
        session.get_one(ApiKey, expired.split("_")[2]).expires_at = 1.0
        session.get_one(ApiKey, revoked.split("_")[2]).revoked_at = 1.0
        forged = keys.create(session, org_id="org-default", name="f", role="user", pepper="q" * 32)
    return {
        "none": None,
        "empty": "Bearer ",
        "other scheme": "Basic dTpw",
        "malformed": "Bearer sk-123",
        "expired": f"Bearer {expired}",
        "revoked": f"Bearer {revoked}",
        "of another pepper": f"Bearer {forged}",
    }


def test_every_route_refuses_every_wrong_key(client, wrong_keys):
    del client.headers["authorization"]
    seen = 0
    for method, path in routes(client.app):
        if path in PUBLIC:
            continue
        for name, value in wrong_keys.items():
            headers = {} if value is None else {"authorization": value}
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path, name, answer.text)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            seen += 1
    assert seen > 100


def test_words_of_the_refusals(client):
    wrong = client.get("/v1/models", headers={"authorization": "Bearer sk-123"}).json()["error"]
    assert wrong["message"].startswith("Incorrect API key provided")
    assert "sk-123" not in wrong["message"]
    del client.headers["authorization"]
    assert "didn't provide an API key" in client.get("/v1/models").json()["error"]["message"]


def test_nothing_of_an_upload_is_read_before_the_key_is_known(client, world):
    del client.headers["authorization"]
    read = 0

    def body():
        nonlocal read
        for _ in range(100):
            read += 1
            yield b"x" * 1000

    answer = client.post(
        "/v1/files", content=body(), headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 401
    assert not world.settings.blobs_dir.exists()


def test_admin_routes_refuse_users(client, as_admin):
    body = {"id": "org/base", "source": "/models/base"}
    answer = client.post("/v1/models/import", json=body)
    assert answer.status_code == 403
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("insufficient_permissions", "permission_error")
    assert client.post("/v1/models/import", json=body, headers=as_admin).status_code == 200


def test_other_tenants_ids_look_like_unknown_ones(client, world, as_stranger):
    model = world.finish(world.start(create_job(client, world)))
    job = client.get("/v1/fine_tuning/jobs").json()["data"][0]["id"]
    file = world.file()
    deployment = world.deploy(model)
    stage = {"name": "s", "model": model, "training_file": file}
    pipeline = client.post("/v1/pipelines", json={"name": "p", "stages": [stage]}).json()["id"]
    wishes = {"filename": "a.jsonl", "purpose": "batch", "bytes": 1}
    upload = client.post("/v1/uploads", json=wishes).json()["id"]
    real = {
        "{file_id}": file,
        "{job_id}": job,
        "{model_id}": model,
        "{deployment_id}": deployment,
        "{pipeline_id}": pipeline,
        "{upload_id}": upload,
        "{vote_id}": client.post("/v1/votes", json=VOTE).json()["id"],
        "{key_id}": world.user.split("_")[2],
    }
    seen = 0
    for path, operations in client.app.openapi()["paths"].items():
        for placeholder, identifier in real.items():
            if placeholder not in path:
                continue
            asks = {"headers": as_stranger}
            if path.endswith("/complete"):
                asks["json"] = {"part_ids": ["some-id"]}
            for method in operations:
                theirs, nobodys = (
                    client.request(method, path.replace(placeholder, name), params=NEEDED.get(path), **asks)
                    for name in (identifier, "nobodys")
                )
                assert theirs.status_code == nobodys.status_code == 404, (method, path)
                assert theirs.text.replace(identifier, "nobodys") == nobodys.text
                seen += 1
    assert seen == 33
    for path in ("files", "fine_tuning/jobs", "deployments", "pipelines"):
        assert client.get(f"/v1/{path}", headers=as_stranger).json()["data"] == []
    bodies = [
        ("/v1/fine_tuning/jobs", {"model": "org/base", "training_file": file}),
        ("/v1/fine_tuning/jobs", {"model": model, "training_file": "file-x"}),
        ("/v1/deployments", {"model": model}),
        ("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hi"}]}),
    ]
    for path, body in bodies:
        assert client.post(path, json=body, headers=as_stranger).status_code == 404, path
    told = client.post("/v1/pipelines", json={"name": "p", "stages": [stage]}, headers=as_stranger).json()
    assert told["error"]["code"] in ("model_not_found", "not_found")
    cursors = {"files": file, "fine_tuning/jobs": job, "deployments": deployment, "pipelines": pipeline}
    for path, cursor in cursors.items():
        answer = client.get(f"/v1/{path}", params={"after": cursor}, headers=as_stranger)
        assert answer.status_code == 400, path


def create_job(client, world) -> str:
    body = {"model": world.base_model(), "training_file": world.file()}
    return client.post("/v1/fine_tuning/jobs", json=body).json()["id"]


def test_a_short_pepper_stops_the_start(world):
    settings = world.settings.model_copy(update={"key_pepper": type(world.settings.key_pepper)("short")})
    with (
        pytest.raises(ValueError, match="RESIDENCY_KEY_PEPPER"),
        TestClient(create_app(settings, world.database)),
    ):
        pass
