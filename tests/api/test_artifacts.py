"""Artifacts: which files of a run a client may have, under which names, and that nothing else gets out."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api.run_files import list_run_files
from db import jobs, tasks

JOBS = "/v1/fine_tuning/jobs"
RESOLVED = {"n_epochs": 3, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 2e-4}
# What a run leaves, and what of it is to be had under which name and as which kind.
TREE = {
    "output/adapter_model.safetensors": ("adapter_model.safetensors", "adapter"),
    "output/adapter_config.json": ("adapter_config.json", "adapter"),
    "output/tokenizer.json": ("tokenizer.json", "tokenizer"),
    "output/chat_template.jinja": ("chat_template.jinja", "tokenizer"),
    "output/trainer_state.json": ("trainer_state.json", "metrics"),
    "output/train_results.json": ("train_results.json", "metrics"),
    "output/eval_results.json": ("eval_results.json", "metrics"),
    "output/evaluation.json": ("evaluation.json", "metrics"),
    "output.tmp/adapter_model.safetensors": None,
    "checkpoints/step-5/MANIFEST.json": ("checkpoint-5/MANIFEST.json", "checkpoint"),
    "checkpoints/step-5/adapter_model.safetensors": ("checkpoint-5/adapter_model.safetensors", "checkpoint"),
    "checkpoints/step-10/MANIFEST.json": ("checkpoint-10/MANIFEST.json", "checkpoint"),
    "checkpoints/step-10/deep/er/optimizer.pt": ("checkpoint-10/deep/er/optimizer.pt", "checkpoint"),
    "checkpoints/step-15/adapter_model.safetensors": None,  # no manifest
    "checkpoints/step-20.tmp/MANIFEST.json": None,
    "checkpoints/step-5.del.tmp/MANIFEST.json": None,
    "checkpoints/stray.json": None,
    "tensorboard/events.out.tfevents.1": ("runs/events.out.tfevents.1", "tensorboard"),
    "log.txt": ("logs/train.log", "log"),
    "merge.log": ("logs/merge.log", "log"),
    "spec.json": None,
    "events.jsonl": None,
    "exit.json": None,
}


@pytest.fixture
def job_id(client, world) -> str:
    body = {"model": world.base_model(), "training_file": world.file(), "seed": 7}
    answer = client.post(JOBS, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


@pytest.fixture
def run_dir(world, job_id) -> Path:
    """A run's folder; every file holds its own name, and spec.json what must not get out."""
    return write_tree(world.settings.runs_dir / job_id / "1")


def write_tree(folder: Path) -> Path:
    for place in TREE:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{folder.name}: {place}")
    return folder


def names(client, job_id: str) -> list[str]:
    return [item["name"] for item in client.get(f"{JOBS}/{job_id}/artifacts").json()["data"]]


def test_the_files_of_a_run_under_the_names_that_users_know(client, world, job_id, run_dir):
    world.start(job_id, resolved=RESOLVED)
    answer = client.get(f"{JOBS}/{job_id}/artifacts").json()
    assert answer.keys() == {"object", "data", "has_more"}
    assert answer["has_more"] is False
    listed = {item["name"]: item for item in answer["data"]}
    assert list(listed) == sorted(listed)
    spec = listed.pop("spec.json")
    assert (spec["kind"], spec["object"], spec["id"]) == ("spec", "fine_tuning.job.artifact", "spec.json")
    expected = {known_as[0]: (place, known_as[1]) for place, known_as in TREE.items() if known_as}
    assert listed.keys() == expected.keys()
    for name, (place, kind) in expected.items():
        content = f"1: {place}".encode()
        assert listed[name] == {
            "id": name,
            "object": "fine_tuning.job.artifact",
            "name": name,
            "bytes": len(content),
            "kind": kind,
            "created_at": int((run_dir / place).stat().st_mtime),
        }
        got = client.get(f"{JOBS}/{job_id}/artifacts/{name}")
        assert (got.status_code, got.content) == (200, content)
        assert client.get(f"{JOBS}/{job_id}/artifacts/{name.replace('/', '%2F')}").content == content
        wanted = "application/json" if name.endswith(".json") else "application/octet-stream"
        assert got.headers["content-type"] == ("text/plain; charset=utf-8" if kind == "log" else wanted)


def test_ranges(client, job_id, run_dir):
    (run_dir / "output" / "adapter_model.safetensors").write_bytes(bytes(range(100)))
    url = f"{JOBS}/{job_id}/artifacts/adapter_model.safetensors"
    part = client.get(url, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
    assert part.headers["content-range"] == "bytes 10-19/100"
    assert client.get(url, headers={"range": "bytes=-5"}).content == bytes(range(95, 100))
    assert client.get(url, headers={"range": "bytes=100-"}).status_code == 416


def test_a_job_that_has_not_run(client, world, job_id):
    assert names(client, job_id) == []
    assert client.get(f"{JOBS}/{job_id}/artifacts/spec.json").status_code == 404
    world.start(job_id, resolved=RESOLVED)
    assert names(client, job_id) == ["spec.json"]


def test_the_spec_is_a_request_for_the_same_job(client, world, job_id):
    world.start(job_id, resolved=RESOLVED)
    job = client.get(f"{JOBS}/{job_id}").json()
    answer = client.get(f"{JOBS}/{job_id}/artifacts/spec.json")
    assert answer.headers["content-type"] == "application/json"
    spec = answer.json()
    file = client.get(f"/v1/files/{job['training_file']}").json()
    assert spec == {
        "spec_version": 2,
        "job_id": job_id,
        "model": "org/base",
        "model_digest": "d1",
        "training_file": file["id"],
        "training_file_sha256": file["sha256"],
        "training_files": None,
        "training_files_sha256": None,
        "validation_file": None,
        "validation_file_sha256": None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": RESOLVED}},
        "seed": 7,
        "resources": {"nproc_per_node": 1, "nnodes": 1},
    }
    assert str(world.settings.home_dir) not in answer.text
    listed = client.get(f"{JOBS}/{job_id}/artifacts").json()["data"]
    assert [item["bytes"] for item in listed if item["name"] == "spec.json"] == [len(answer.content)]
    wanted = ("model", "training_file", "training_files", "validation_file", "method", "seed", "resources")
    again = client.post(JOBS, json={key: spec[key] for key in wanted}).json()
    assert again["hyperparameters"].items() >= RESOLVED.items()
    assert [again[key] for key in ("model", "seed", "resources")] == ["org/base", 7, spec["resources"]]


def test_the_spec_outlives_its_file(client, world, job_id):
    with tasks.fenced(world.database, lease := world.start(job_id, resolved=RESOLVED)) as session:
        jobs.fail(session, lease, error={"code": "nan_loss", "message": "NaN", "param": None})
    training_file = client.get(f"{JOBS}/{job_id}").json()["training_file"]
    assert client.delete(f"/v1/files/{training_file}").status_code == 200
    spec = client.get(f"{JOBS}/{job_id}/artifacts/spec.json").json()
    assert (spec["training_file"], spec["training_file_sha256"]) == (training_file, None)


def test_the_attempt_that_finished_or_else_the_newest(client, world, job_id):
    for attempt in (1, 2, 10):
        write_tree(world.settings.runs_dir / job_id / str(attempt))
    url = f"{JOBS}/{job_id}/artifacts/adapter_config.json"
    assert client.get(url).text.startswith("10: ")
    lease = world.start(job_id)
    assert lease.token == 1
    world.finish(lease)
    assert client.get(url).text.startswith("1: ")


@pytest.mark.parametrize(
    "name",
    [
        "../1/exit.json",
        "../../../../../../../../../../etc/passwd",
        "/etc/passwd",
        "output/adapter_config.json",
        "checkpoint-5/../../exit.json",
        "checkpoint-15/adapter_model.safetensors",
        "checkpoint-20.tmp/MANIFEST.json",
        "checkpoint-5",
        "runs",
        "exit.json",
        "log.txt",
        "./adapter_config.json",
        "adapter_config.json/",
        "",
        "nul\x00",
    ],
)
def test_only_names_of_the_list_are_served(client, job_id, run_dir, name):
    escaped = "".join(f"%{byte:02x}" for byte in name.encode())  # clients tidy up `..` themselves
    answer = client.get(f"{JOBS}/{job_id}/artifacts/{escaped}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert (run_dir / "exit.json").is_file()


def test_links_lead_nowhere(client, job_id, run_dir, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "MANIFEST.json").write_text("secret")
    (run_dir / "output" / "linked.json").symlink_to(tmp_path / "secret" / "MANIFEST.json")
    (run_dir / "output" / "folder").symlink_to(tmp_path / "secret")
    (run_dir / "checkpoints" / "step-30").symlink_to(tmp_path / "secret")
    (run_dir / "output" / "broken.json").symlink_to("nowhere")
    os.mkfifo(run_dir / "output" / "pipe")
    there = names(client, job_id)
    assert len(there) == sum(known_as is not None for known_as in TREE.values())
    for name in ("linked.json", "folder/MANIFEST.json", "checkpoint-30/MANIFEST.json", "pipe"):
        assert name not in there
        assert client.get(f"{JOBS}/{job_id}/artifacts/{name}").status_code == 404


def test_jobs_of_others_have_no_artifacts(client, job_id, run_dir, as_stranger):
    assert run_dir.is_dir()
    for path in ("artifacts", "artifacts/adapter_config.json", "artifacts/spec.json"):
        assert client.get(f"{JOBS}/{job_id}/{path}", headers=as_stranger).status_code == 404
        assert client.get(f"{JOBS}/ftjob-unknown/{path}").status_code == 404


def test_a_log_that_grows_while_it_is_sent(run_dir, monkeypatch, client, job_id):
    """The file is longer when it is read than when its length was told."""

    def list_and_grow(folder: Path):
        found = list_run_files(folder)
        with (folder / "log.txt").open("a") as log:
            log.write("more")
        return found

    monkeypatch.setattr("api.artifacts.list_run_files", list_and_grow)
    before = (run_dir / "log.txt").read_bytes()
    answer = client.get(f"{JOBS}/{job_id}/artifacts/logs/train.log")
    assert (answer.headers["content-length"], answer.content) == (str(len(before)), before)


def test_large_files_come_whole(client, job_id, run_dir):
    content = os.urandom(3_000_000)
    (run_dir / "output" / "adapter_model.safetensors").write_bytes(content)
    got = client.get(f"{JOBS}/{job_id}/artifacts/adapter_model.safetensors").content
    assert hashlib.sha256(got).digest() == hashlib.sha256(content).digest()


def test_the_sdk_pages_through_them(server, world, client: TestClient, job_id, run_dir):
    """The list is in OpenAI's shape, so its client can read a page of it."""
    from openai import OpenAI
    from openai.pagination import SyncCursorPage

    assert run_dir.is_dir()
    with OpenAI(base_url=f"{server}/v1", api_key=world.user) as sdk:
        page = sdk.get(f"/fine_tuning/jobs/{job_id}/artifacts", cast_to=SyncCursorPage)
    assert [item["id"] for item in page.data] == names(client, job_id)
    assert json.loads(page.to_json())["has_more"] is False
