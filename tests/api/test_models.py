"""Models: bases that admins import, results of jobs, and ids with every character that ids have."""

import json
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import select

from db import registry, tasks
from db.models import Model

MODELS = "/v1/models"


@pytest.fixture
def tuned(client, world) -> str:
    """`ft:org--base:default:v1:…`, the result of a job."""
    body = {"model": world.base_model(), "training_file": world.file(), "suffix": "v1"}
    job = client.post("/v1/fine_tuning/jobs", json=body).json()
    return world.finish(world.start(job["id"]))


def test_list_and_lineage(client, tuned, as_admin):
    listed = client.get(MODELS).json()
    assert listed.keys() == {"object", "data"}
    base, merged = listed["data"]
    assert (
        base.items() >= {"id": "org/base", "kind": "base", "status": "ready", "max_model_len": 2048}.items()
    )
    expected = {"id": tuned, "object": "model", "kind": "merged", "parent": "org/base", "root": "org/base"}
    assert merged.items() >= (expected | {"digest": "d2", "owned_by": "org-default", "source": None}).items()
    assert isinstance(merged["created"], int)
    assert client.get(MODELS, headers=as_admin).json()["data"][0]["source"] == "/source"


def test_a_model_tells_how_it_was_evaluated(client, world, tuned, as_stranger):
    assert client.get(f"{MODELS}/{tuned}").json()["evaluation"] is None
    answer = {"prompt": "Hello", "answer": "Hi\u0000 \U0001f600", "finish_reason": "stop"}
    evaluation = {"steps": [{"step": 0, "valid_loss": None}, {"step": 4, "answers": [answer]}]}
    with world.database.read() as session:
        path = registry.get(session, tuned, org_id="org-default").path
    (Path(path) / "evaluation.json").write_text(json.dumps(evaluation))
    assert client.get(f"{MODELS}/{tuned}").json()["evaluation"] == evaluation
    assert {model["evaluation"] for model in client.get(MODELS).json()["data"]} == {None}
    assert client.get(f"{MODELS}/org/base").json()["evaluation"] is None
    assert client.get(f"{MODELS}/{tuned}", headers=as_stranger).status_code == 404


@pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
def test_the_way_from_the_base_is_told_even_where_it_is_deleted(client, world, tuned, as_stranger):
    def train(model: str, method: str) -> tuple[str, str]:
        file = world.file(kind="preference" if method == "dpo" else "conversation")
        body = {"model": model, "training_file": file, "method": {"type": method}}
        job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        return job_id, world.finish(world.start(job_id))

    def step(model: str, job_id: str | None = None, method: str | None = None, **more) -> dict[str, object]:
        kind = "merged" if job_id else "base"
        return {"model": model, "kind": kind, "job_id": job_id, "method": method, "deleted": False} | more

    first_job = client.get(f"{MODELS}/{tuned}").json()["job_id"]
    second_job, second = train(tuned, "dpo")
    assert client.delete(f"{MODELS}/{tuned}").status_code == 200
    third_job, third = train(second, "supervised")
    base = step("org/base")
    assert client.get(f"{MODELS}/org/base").json()["lineage"] == [base]
    assert client.get(f"{MODELS}/org/base", headers=as_stranger).json()["lineage"] == [base]
    assert client.get(f"{MODELS}/{third}").json()["lineage"] == [
        base,
        step(tuned, first_job, "supervised", deleted=True),
        step(second, second_job, "dpo"),
        step(third, third_job, "supervised"),
    ]
    listed = {model["id"]: model for model in client.get(MODELS).json()["data"]}
    assert (listed[third]["job_id"], listed[third]["lineage"]) == (third_job, None)


def test_an_imported_adapter_came_from_the_base_that_had_the_id_then(client, world):
    world.base_model()
    with world.database.write() as session:
        registry.start_import(
            session, org_id="org-default", model_id="mine", source="/adapter", base_id="org/base"
        )
        session.scalars(select(Model).where(Model.id == "org/base")).one().deleted_at = 1.0
        session.flush()
        registry.start_import(session, org_id="org-default", model_id="org/base", source="/other")
    way = client.get(f"{MODELS}/mine").json()["lineage"]
    assert [(each["model"], each["deleted"]) for each in way] == [("org/base", True), ("mine", False)]


def test_ids_raw_and_percent_encoded(client, tuned):
    for model_id in ("org/base", tuned):
        for spelling in (model_id, quote(model_id, safe=""), quote(model_id, safe="/")):
            answer = client.get(f"{MODELS}/{spelling}")
            assert (answer.status_code, answer.json().get("id")) == (200, model_id)


def test_ids_with_a_slash_and_a_colon(client, world):
    """As older installations and other services have them."""
    world.base_model("org/base")
    for spelling in ("ft:a/b:c", "ft%3Aa%2Fb%3Ac"):
        error = client.get(f"{MODELS}/{spelling}").json()["error"]
        assert error["message"] == "The model `ft:a/b:c` does not exist or you do not have access to it."
        assert error["code"] == "model_not_found"


def test_import_by_an_admin(client, world, as_admin):
    body = {"id": "org/new.model-1", "source": "/models/new"}
    created = client.post(f"{MODELS}/import", json=body, headers=as_admin)
    assert created.status_code == 200, created.text
    expected = {"id": "org/new.model-1", "status": "importing", "source": "/models/new", "digest": None}
    assert created.json().items() >= expected.items()
    again = client.post(f"{MODELS}/import", json=body, headers=as_admin)
    error = again.json()["error"]
    assert (again.status_code, error["code"], error["param"]) == (400, "model_exists", "id")
    job = {"model": "org/new.model-1", "training_file": world.file(purpose="batch")}
    assert client.post("/v1/fine_tuning/jobs", json=job).json()["error"]["code"] == "model_not_ready"


def test_a_failed_import_tells_why_and_may_be_tried_again(client, world, as_admin):
    body = {"id": "base", "source": "/models/base"}
    client.post(f"{MODELS}/import", json=body, headers=as_admin)
    lease = world.claim("cpu")
    with tasks.fenced(world.database, lease) as session:
        tasks.finish(session, lease, outcome="failed")
        registry.fail_import(session, int(lease.subject_id), code="no_safetensors", message="No weights")
    failed = client.get(f"{MODELS}/base").json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "no_safetensors")
    assert client.delete(f"{MODELS}/base").json()["error"]["code"] == "model_not_deletable"
    assert client.post(f"{MODELS}/import", json=body, headers=as_admin).status_code == 200
    assert len(client.get(MODELS).json()["data"]) == 1


@pytest.mark.parametrize(
    "model_id", ["", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a b", "ft:x", "a" * 129, "ü", "a\n"]
)
def test_ids_that_are_refused(client, as_admin, model_id):
    answer = client.post(f"{MODELS}/import", json={"id": model_id, "source": "/s"}, headers=as_admin)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id")


def test_a_failed_import_says_why_to_chats_and_jobs(client, world, as_admin):
    client.post(f"{MODELS}/import", json={"id": "base", "source": "/models/base"}, headers=as_admin)
    lease = world.claim("cpu")
    with tasks.fenced(world.database, lease) as session:
        tasks.finish(session, lease, outcome="failed")
        registry.fail_import(session, int(lease.subject_id), code="no_safetensors", message="No weights.")
    chat = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
    job = {"model": "base", "training_file": world.file(purpose="batch")}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/fine_tuning/jobs", job),
        ("/v1/deployments", {"model": "base"}),
    ):
        answer = client.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "model_not_ready", "model"), path
        assert error["message"] == "The import of 'base' failed: No weights. (no_safetensors)"


def test_an_adapter_becomes_a_model_of_its_organisation(client, world, as_admin, as_stranger):
    world.base_model()
    body = {"id": "tuned", "source": "/models/adapter", "base": "org/base"}
    created = client.post(f"{MODELS}/import", json=body, headers=as_admin).json()
    expected = {
        "id": "tuned",
        "status": "importing",
        "kind": "merged",
        "parent": "org/base",
        "root": "org/base",
    }
    assert created.items() >= expected.items()
    assert client.get(f"{MODELS}/tuned", headers=as_stranger).status_code == 404
    # A public model of that name would stand beside it.
    body = {"id": "tuned", "source": "/models/x"}
    answer = client.post(f"{MODELS}/import", json=body, headers=as_stranger)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_exists")
    unready = {"id": "other", "source": "/models/adapter", "base": "tuned"}
    answer = client.post(f"{MODELS}/import", json=unready, headers=as_admin)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_ready")
    for headers in (as_admin, as_stranger):
        body = {"id": "other", "source": "/models/adapter", "base": "nowhere"}
        answer = client.post(f"{MODELS}/import", json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "base")


@pytest.mark.usefixtures("tuned")
def test_adapters_in_order(client, as_admin):
    job_id = client.get("/v1/fine_tuning/jobs").json()["data"][0]["id"]
    asked = {"id": "both", "base": "org/base", "adapters": [job_id, "/adapters/second"]}
    created = client.post(f"{MODELS}/import", json=asked, headers=as_admin).json()
    assert created.items() >= {"status": "importing", "kind": "merged", "parent": "org/base"}.items()

    def refuse(**changes: object) -> tuple[int, str, str]:
        body = {"id": "other"} | asked | changes
        answer = client.post(f"{MODELS}/import", json={k: v for k, v in body.items() if v}, headers=as_admin)
        return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]

    asked["id"] = "other"
    assert refuse(base=None) == (400, "missing_required_parameter", "base")
    assert refuse(adapters=None) == (400, "missing_required_parameter", "source")
    assert refuse(source="/adapters/first") == (400, "invalid_value", "adapters")
    assert refuse(adapters=None, source=job_id) == (400, "invalid_value", "source")
    assert refuse(adapters=["/a", "hf://org/name"]) == (400, "hub_disabled", "adapters.1")
    assert refuse(adapters=[job_id, job_id]) == (400, "wrong_base", "adapters.1")
    assert refuse(adapters=["ftjob-nowhere"]) == (400, "adapter_not_found", "adapters.0")
    assert refuse(base="nowhere") == (404, "model_not_found", "base")


def test_hubs_are_off_unless_they_are_on(client, settings, as_admin):
    body = {"id": "a", "source": "hf://org/name@v1"}
    answer = client.post(f"{MODELS}/import", json=body, headers=as_admin)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "hub_disabled")
    settings.hub = True
    created = client.post(f"{MODELS}/import", json=body, headers=as_admin)
    assert created.json()["source"] == "hf://org/name@v1"
    answer = client.post(f"{MODELS}/import", json={"id": "b", "source": "hf:///etc"}, headers=as_admin)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "source")


def test_imports_can_be_switched_off(client, settings, as_admin):
    settings.import_enabled = False
    answer = client.post(f"{MODELS}/import", json={"id": "a", "source": "/s"}, headers=as_admin)
    assert answer.status_code == 403


def test_delete(client, tuned, as_admin):
    for headers in ({}, as_admin):
        answer = client.delete(f"{MODELS}/org/base", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_deletable")
    assert client.delete(f"{MODELS}/{tuned}").json() == {"id": tuned, "object": "model", "deleted": True}
    assert client.get(f"{MODELS}/{tuned}").status_code == 404
    assert client.delete(f"{MODELS}/{tuned}").status_code == 404
    assert client.get("/v1/fine_tuning/jobs").json()["data"][0]["fine_tuned_model"] == tuned


def test_a_deployed_model_stays(client, world, tuned):
    world.deploy(tuned)
    answer = client.delete(f"{MODELS}/{tuned}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_in_use")
