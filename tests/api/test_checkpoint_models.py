"""Checkpoints are models: listed and deployed under their names, as long as their files are there."""

import json
import shutil

import pytest

from db import checkpoints, deployments, tasks
from db.models import Deployment, Job

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def body(world) -> dict:
    return {"model": world.base_model(), "training_file": world.file(), "suffix": "v1"}


def start(client, world, body):
    job = client.post(JOBS, json=body).json()["id"]
    return job, world.start(job)


def save(world, lease, *steps: int) -> None:
    """What the supervisor records of checkpoints that the trainer has sealed."""
    for step in steps:
        folder = world.settings.runs_dir / lease.subject_id / "1" / f"step-{step}"
        folder.mkdir(parents=True)
        with tasks.fenced(world.database, lease) as session:
            job = session.get_one(Job, lease.subject_id)
            checkpoints.record(session, job, step=step, path=folder, manifest_sha256=f"m{step}", metrics={})


def names(client, job: str) -> list[str]:
    saved = client.get(f"{JOBS}/{job}/checkpoints").json()["data"]
    return [item["fine_tuned_model_checkpoint"] for item in saved]


def test_a_checkpoint_has_the_name_of_the_model_to_be(client, world, body):
    job, lease = start(client, world, body)
    save(world, lease, 5, 10)
    newest, older = names(client, job)
    model = world.finish(lease)
    assert (newest, older) == (f"{model}:ckpt-step-10", f"{model}:ckpt-step-5")
    assert model.startswith("ft:org--base:default:v1:")
    assert client.get(f"/v1/models/{newest}").json() == {
        "id": newest,
        "object": "model",
        "created": client.get(f"/v1/models/{newest}").json()["created"],
        "owned_by": "org-default",
        "status": "ready",
        "kind": "checkpoint",
        "parent": "org/base",
        "root": "org/base",
        "digest": "m10",
        "max_model_len": 2048,
        "details": {"context_length": 2048, "head": "lm"},
        "error": None,
        "source": None,
        "evaluation": None,
        "job_id": job,
        "lineage": [
            {"model": "org/base", "kind": "base", "job_id": None, "method": None, "deleted": False},
            {"model": newest, "kind": "checkpoint", "job_id": job, "method": "supervised", "deleted": False},
        ],
    }
    evaluation = {"steps": [{"step": 5, "valid_loss": 1.0}]}
    (world.settings.runs_dir / job / "1" / "step-5" / "evaluation.json").write_text(json.dumps(evaluation))
    assert client.get(f"/v1/models/{older}").json()["evaluation"] == evaluation
    assert {newest, older, model} < {listed["id"] for listed in client.get("/v1/models").json()["data"]}


def test_it_can_be_deployed_but_neither_trained_on_nor_deleted(client, world, body):
    job, lease = start(client, world, body)
    save(world, lease, 5)
    (name,) = names(client, job)
    assert client.post("/v1/deployments", json={"model": name}).json()["model"] == name
    refused = client.post(JOBS, json=body | {"model": name})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_not_trainable")
    refused = client.delete(f"/v1/models/{name}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_not_deletable")
    assert client.get(f"/v1/models/{name}").status_code == 200


def test_other_tenants_see_none(client, world, body, as_stranger):
    job, lease = start(client, world, body)
    save(world, lease, 5)
    (name,) = names(client, job)
    assert client.get(f"/v1/models/{name}", headers=as_stranger).status_code == 404
    assert client.post("/v1/deployments", json={"model": name}, headers=as_stranger).status_code == 404


def test_a_checkpoint_that_was_rotated_away_is_served_no_more(client, world, body):
    job, lease = start(client, world, body)
    save(world, lease, 5, 10)
    newest, older = names(client, job)
    deployment = client.post("/v1/deployments", json={"model": older}).json()["id"]
    shutil.rmtree(world.settings.runs_dir / job / "1" / "step-5")
    with tasks.fenced(world.database, lease) as session:
        checkpoints.forget_missing(session, session.get_one(Job, job))
    assert names(client, job) == [newest]
    assert client.get(f"/v1/models/{older}").json()["error"]["code"] == "model_not_found"
    with world.database.read() as session:
        assert session.get_one(Deployment, deployment).desired == "stopped"


def test_a_step_reached_again_is_the_same_model(client, world, body):
    job, lease = start(client, world, body)
    save(world, lease, 5)
    with tasks.fenced(world.database, lease) as session:
        row = session.get_one(Job, job)
        checkpoints.record(
            session, row, step=5, path=world.settings.runs_dir / "again", manifest_sha256="m9", metrics={}
        )
    (name,) = names(client, job)
    assert client.get(f"/v1/models/{name}").json()["digest"] == "m9"


def test_a_model_takes_the_checkpoints_that_stand_on_it_along(client, world, body):
    _, lease = start(client, world, body)
    parent = world.finish(lease)
    job, lease = start(client, world, body | {"model": parent})
    save(world, lease, 5)
    (name,) = names(client, job)
    child = world.finish(lease)
    assert name.startswith(child)
    made = client.post("/v1/deployments", json={"model": name}).json()["id"]
    refused = client.delete(f"/v1/models/{parent}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_in_use")
    with world.database.write() as session:
        deployments.stop(session, made, org_id="org-default")
    assert client.delete(f"/v1/models/{parent}").status_code == 200
    assert client.get(f"/v1/models/{name}").status_code == 404
    assert client.get(f"/v1/models/{child}").status_code == 200
