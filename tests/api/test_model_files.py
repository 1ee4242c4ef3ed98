"""Files of models: listed and taken away by those who may use the model, and nothing else gets out."""

import os
from pathlib import Path

import pytest
from sqlalchemy import update

from db.models import Model

MODELS = "/v1/models"


@pytest.fixture
def base(world) -> str:
    """A base model with files, a link out of its folder and a neighbour."""
    model_id = world.base_model("org/base")
    folder = world.settings.models_dir / "base"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "deep" / "config.json").write_bytes(b"{}")
    (world.settings.models_dir / "base.log").write_bytes(b"not of the model")
    os.symlink(world.settings.models_dir / "base.log", folder / "link")
    return model_id


def test_files_are_listed_and_taken_away(client, base, as_stranger):
    path = f"{MODELS}/{base}/files"
    listed = client.get(path).json()
    assert [(file["name"], file["bytes"]) for file in listed["data"]] == [
        ("deep/config.json", 2),
        ("model.safetensors", 7),
    ]
    assert listed["data"][0] == {
        "id": "deep/config.json",
        "object": "model.file",
        "name": "deep/config.json",
        "bytes": 2,
        "created_at": listed["data"][0]["created_at"],
    }
    assert client.get(path, headers=as_stranger).json() == listed, "a public base"
    whole = client.get(f"{path}/model.safetensors")
    assert (whole.content, whole.headers["content-length"]) == (b"weights", "7")
    assert 'filename="model.safetensors"' in whole.headers["content-disposition"]
    part = client.get(f"{path}/model.safetensors", headers={"range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"igh")
    assert client.get(f"{MODELS}/org%2Fbase/files/deep%2Fconfig.json").content == b"{}"
    assert client.get(f"{MODELS}/{base}").json()["id"] == base


def test_nothing_else_gets_out(client, base):
    for name in ("link", "../base.log", "..%2Fbase.log", "deep", "/etc/passwd", "%2Fetc%2Fpasswd", ""):
        answer = client.get(f"{MODELS}/{base}/files/{name}")
        assert answer.status_code == 404, name
    assert client.get(f"{MODELS}/nobodys/files").json()["error"]["code"] == "model_not_found"


def test_results_are_their_owners_and_checkpoints_are_their_adapters(client, world, base, as_stranger):
    body = {"model": base, "training_file": world.file()}
    job = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    tuned = world.finish(world.start(job))
    folder = world.settings.models_dir / job
    (folder / "model.safetensors").write_bytes(b"merged")
    assert client.get(f"{MODELS}/{tuned}/files/model.safetensors").content == b"merged"
    for path in ("files", "files/model.safetensors"):
        assert client.get(f"{MODELS}/{tuned}/{path}", headers=as_stranger).status_code == 404

    adapter = Path(folder, "a")
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"adapter")
    with world.database.write() as session:
        session.execute(
            update(Model).where(Model.id == tuned).values(kind="checkpoint", adapter_path=str(adapter))
        )
    (file,) = client.get(f"{MODELS}/{tuned}/files").json()["data"]
    assert file["name"] == "adapter_model.safetensors"


def test_an_id_that_could_be_mistaken_for_files_is_refused(client, as_admin):
    for model_id in ("org/files", "org/files/a"):
        answer = client.post(f"{MODELS}/import", json={"id": model_id, "source": "/m"}, headers=as_admin)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id"), answer.text
    for model_id in ("files", "org/files-1"):
        answer = client.post(f"{MODELS}/import", json={"id": model_id, "source": "/m"}, headers=as_admin)
        assert answer.status_code == 200, answer.text


def test_a_model_that_is_still_imported_has_none(client, as_admin):
    client.post(f"{MODELS}/import", json={"id": "new", "source": "/m"}, headers=as_admin)
    assert client.get(f"{MODELS}/new/files").json()["data"] == []
