"""Training data from a hub: named now, fetched by a worker."""

import pytest

from db import files, tasks
from db.blobs import BlobWriter
from tests.api.conftest import ORG, ROWS

IMPORT = "/v1/files/import"
SOURCE = {"source": "hf://org/data@v1"}


@pytest.fixture
def imported(client, settings) -> str:
    settings.hub = True
    return client.post(IMPORT, json=SOURCE | {"config": "good"}).json()["id"]


def test_a_file_is_named_before_it_is_here(client, imported):
    file = client.get(f"/v1/files/{imported}").json()
    expected = {
        "bytes": 0,
        "filename": "data.jsonl",
        "purpose": "fine-tune",
        "status": "uploaded",
        "sha256": "",
    }
    assert file.items() >= expected.items()
    assert file["source"] == "hf://org/data@v1?config=good&split=train"
    answer = client.get(f"/v1/files/{imported}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_ready")
    assert [found["id"] for found in client.get("/v1/files").json()["data"]] == [imported]


def test_what_is_said_of_the_rows_is_echoed(client, settings):
    settings.hub = True
    said = {"format": "question", "column_map": {"question": "Frage"}, "max_invalid_fraction": 0.5}
    file = client.post(IMPORT, json=SOURCE | said).json()
    assert file.items() >= said.items()
    assert client.get(f"/v1/files/{file['id']}").json() == file


def test_its_bytes_come(client, imported, world):
    lease = world.claim("cpu")
    assert (lease.kind, lease.subject_id) == ("validate", imported)
    with BlobWriter(world.settings.blobs_dir, ORG) as writer:
        writer.write(ROWS)
        writer.sync()
        with tasks.fenced(world.database, lease) as session:
            assert files.record_bytes(session, imported, writer)
    assert client.get(f"/v1/files/{imported}/content").content == ROWS
    assert client.get(f"/v1/files/{imported}").json()["bytes"] == len(ROWS)


def test_one_that_never_came_can_be_deleted(client, imported, world):
    kept = world.file(purpose="batch")
    assert client.delete(f"/v1/files/{imported}").json()["deleted"]
    assert client.get(f"/v1/files/{imported}").status_code == 404
    assert client.get(f"/v1/files/{kept}/content").content == ROWS


def test_bytes_that_come_too_late_are_not_kept(client, imported, world):
    lease = world.claim("cpu")
    client.delete(f"/v1/files/{imported}")
    with BlobWriter(world.settings.blobs_dir, ORG) as writer:
        writer.write(ROWS)
        writer.sync()
        with tasks.fenced(world.database, lease) as session:
            assert not files.record_bytes(session, imported, writer)
    assert [path for path in world.settings.blobs_dir.rglob("*") if path.is_file()] == []


def test_hubs_are_off_unless_they_are_on(client):
    answer = client.post(IMPORT, json=SOURCE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "hub_disabled")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"source": "/etc/passwd"}, "source"),
        ({"source": "https://hub/org/data"}, "source"),
        ({"source": "hf://org/data?split=train"}, "source"),
        (SOURCE | {"split": "../x"}, "split"),
        (SOURCE | {"split": "-x"}, "split"),
        (SOURCE | {"config": ""}, "config"),
        (SOURCE | {"purpose": "batch"}, "purpose"),
        (SOURCE | {"trust_remote_code": True}, "trust_remote_code"),
        (SOURCE | {"format": "alpacca"}, "format"),
        (SOURCE | {"format": "plain_text"}, "format"),
        (SOURCE | {"column_map": {"question": 1}}, "column_map"),
        (SOURCE | {"max_invalid_fraction": 1}, "max_invalid_fraction"),
    ],
)
def test_bodies_that_are_refused(client, settings, body, param):
    settings.hub = True
    answer = client.post(IMPORT, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
