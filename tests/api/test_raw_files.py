"""Raw uploads: the same checks and answer as a form's, and a digest that is held to."""

import base64
import hashlib
import threading

import anyio
import pytest
from fastapi.concurrency import run_in_threadpool

from api import digests, intake
from tests.api.test_files import leftovers, upload

CONTENT = b'{"prompt": "a", "completion": "b"}\n' * 50
SHA256 = hashlib.sha256(CONTENT).hexdigest()
B64 = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
OTHER = base64.b64encode(hashlib.sha256(b"").digest()).decode()
QUERY = {"filename": "rows.jsonl", "purpose": "fine-tune"}


def put(client, content=CONTENT, *, headers: dict[str, str] | None = None, **query: str):
    return client.put("/v1/files", params=QUERY | query, content=content, headers=headers)


def test_the_answer_is_that_of_a_form(client, settings, world):
    raw, form = put(client).json(), upload(client, CONTENT).json()
    changing = {"id", "created_at"}
    assert {key: raw[key] for key in raw.keys() - changing} == {
        key: form[key] for key in form.keys() - changing
    }
    assert client.get(f"/v1/files/{raw['id']}/content").content == CONTENT
    assert len(leftovers(settings)) == 1
    world.check_file(raw["id"])


@pytest.mark.parametrize("size", [1, intake.LOAD_BYTES - 1, intake.LOAD_BYTES, intake.LOAD_BYTES * 3 + 1])
def test_loads_of_any_size_are_stored_in_order(client, settings, size):
    settings.max_upload_bytes = 2 * size
    content = hashlib.shake_256(b"seed").digest(size)
    pieces = (content[start : start + 70_001] for start in range(0, size, 70_001))
    file = put(client, pieces, purpose="batch").json()
    assert (file["bytes"], file["sha256"]) == (size, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    "digest",
    [
        f"sha-256=:{B64}:",
        f"sha-512=:AAAA:, sha-256=:{B64}:",
        f"sha-256=:{B64}: , md5=:AAAA:",
        "sha-512=:AAAA:",  # which is not ours to check
    ],
)
def test_bytes_that_keep_their_promise(client, digest):
    file = put(client, headers={"repr-digest": digest}, sha256=SHA256.upper()).json()
    assert file["sha256"] == SHA256
    answer = client.get(f"/v1/files/{file['id']}/content")
    assert answer.headers["repr-digest"] == f"sha-256=:{B64}:"
    assert digests.read(answer.headers["repr-digest"]) == SHA256


@pytest.mark.parametrize(
    ("headers", "query", "param"),
    [
        ({"repr-digest": f"sha-256=:{OTHER}:"}, {}, "Repr-Digest"),
        ({}, {"sha256": "0" * 64}, "sha256"),
        ({"repr-digest": f"sha-256=:{OTHER}:"}, {"sha256": SHA256}, "sha256"),
    ],
)
def test_bytes_that_break_their_promise_are_not_stored(client, settings, headers, query, param):
    error = put(client, headers=headers, **query)
    assert (error.status_code, error.json()["error"]["code"]) == (400, "digest_mismatch")
    assert error.json()["error"]["param"] == param
    assert SHA256 in error.json()["error"]["message"]
    assert leftovers(settings) == []
    assert client.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    ("content", "query", "headers", "code", "param"),
    [
        (b"", {}, {}, "empty_file", "file"),
        (CONTENT, {"purpose": "mischief"}, {}, "invalid_value", "purpose"),
        (CONTENT, {"filename": ""}, {}, "invalid_value", "filename"),
        (CONTENT, {"file": "a"}, {}, "unknown_parameter", "file"),
        (CONTENT, {"sha256": "abc"}, {}, "invalid_value", "sha256"),
        (CONTENT, {}, {"repr-digest": f"sha-256={B64}"}, "invalid_value", "Repr-Digest"),
        (CONTENT, {}, {"repr-digest": "sha-256=:AAAA:"}, "invalid_value", "Repr-Digest"),
        (CONTENT, {"expires_after[anchor]": "created_at"}, {}, "invalid_value", "expires_after[seconds]"),
        (CONTENT, {"expires_after[seconds]": "3600"}, {}, "invalid_value", "expires_after[anchor]"),
        (
            CONTENT,
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            {},
            "invalid_value",
            "expires_after[seconds]",
        ),
    ],
)
def test_refused_bodies_leave_nothing(client, settings, content, query, headers, code, param):
    answer = put(client, content, headers=headers, **query)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), answer.text
    assert leftovers(settings) == []


@pytest.mark.parametrize("missing", ["filename", "purpose"])
def test_what_must_be_said(client, missing):
    query = {name: value for name, value in QUERY.items() if name != missing}
    error = client.put("/v1/files", params=query, content=CONTENT).json()["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", missing)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("excess", "status"), [(0, 200), (1, 413), (1_000_000, 413)])
def test_the_limit_is_that_of_a_form(client, settings, chunked, excess, status):
    content = b"x" * (settings.max_upload_bytes + excess)
    pieces = (content[start : start + 5000] for start in range(0, len(content), 5000))
    answer = put(client, pieces if chunked else content, purpose="batch")
    assert answer.status_code == status, answer.text
    assert len(leftovers(settings)) == (1 if status == 200 else 0)


def test_it_expires_and_is_sent_again_like_a_form(client):
    expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    first = put(client, headers={"idempotency-key": "k"}, **expiry)
    again = put(client, headers={"idempotency-key": "k"}, **expiry)
    assert first.json()["expires_at"] == first.json()["created_at"] + 3600
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    other = put(client, b"{}", headers={"idempotency-key": "k"}, **expiry)
    assert other.json()["error"]["code"] == "idempotency_key_reused"


@pytest.mark.parametrize(
    ("given", "shown"),
    [("../../etc/passwd", "passwd"), ("x" * 4096 + ".csv", "x" * 251 + ".csv"), ("a\x00b\x1b.txt", "ab.txt")],
)
def test_names_are_only_labels(client, settings, given, shown):
    file = put(client, filename=given, purpose="batch").json()
    assert file["filename"] == shown
    assert [path.name for path in leftovers(settings)] == [file["sha256"]]


def test_uploads_that_wait_for_the_disk_keep_nobody_else_waiting():
    disk = threading.Event()

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(intake.on_disk, disk.wait)
            await anyio.wait_all_tasks_blocked()
            try:
                with anyio.fail_after(5):
                    assert await run_in_threadpool(disk.is_set) is False
            finally:
                disk.set()

    anyio.run(main)
