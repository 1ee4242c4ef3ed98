"""A full disk refuses uploads and damages nothing (G17)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.test_files import leftovers, upload
from tests.api.test_uploads import begin, complete, send
from tests.faults.injections import may_mount, small_disk

pytestmark = pytest.mark.skipif(not may_mount(), reason="this process may not mount")
DISK_BYTES = 300 * 1024


@pytest.fixture
def disk(settings) -> Iterator[Path]:
    """A small file system under the store."""
    settings.blobs_dir.mkdir(parents=True)
    with small_disk(settings.blobs_dir, DISK_BYTES):
        yield settings.blobs_dir


def test_uploads_to_a_full_disk_are_refused_and_leave_nothing(client, disk, settings):
    first = upload(client, b"1" * 150_000, purpose="batch").json()
    upload_id = begin(client, bytes=180_000)
    part = send(client, upload_id, b"2" * 90_000).json()["id"]
    query = {"filename": "a", "purpose": "batch"}
    for answer in (
        upload(client, b"3" * 150_000, purpose="batch"),
        client.put("/v1/files", params=query, content=b"3" * 150_000),
        send(client, upload_id, b"3" * 80_000),
        complete(client, upload_id, [part, part]),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full"), answer.text
        assert answer.headers["x-should-retry"] == "false"
        assert list((disk / "incoming").iterdir()) == []
    assert len(leftovers(settings)) == 2
    assert client.get("/v1/files").json()["data"] == [first]
    client.delete(f"/v1/files/{first['id']}")
    assert complete(client, upload_id, [part, part]).status_code == 200
