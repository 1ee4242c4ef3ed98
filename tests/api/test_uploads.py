"""Uploads in parts: any order, again and again, and nothing is left of those that did not become a file."""

import hashlib
import os

import pytest
from openai import OpenAI
from sqlalchemy import update

from api import uploads as api_uploads
from db import blobs, upkeep
from db.models import Upload

CONTENT = os.urandom(1000)
HALVES = (CONTENT[:600], CONTENT[600:])
WISHES = {"filename": "rows.jsonl", "purpose": "batch", "mime_type": "text/jsonl", "bytes": len(CONTENT)}


@pytest.fixture
def sdk(server, world):
    with OpenAI(base_url=f"{server}/v1", api_key=world.user, max_retries=0) as client:
        yield client


def begin(client, **changes) -> str:
    answer = client.post("/v1/uploads", json=WISHES | changes)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def send(client, upload_id: str, data: bytes):
    return client.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("blob", data)})


def send_all(client, upload_id: str, *parts: bytes) -> list[str]:
    return [send(client, upload_id, part).json()["id"] for part in parts]


def complete(client, upload_id: str, part_ids: list[str], **more):
    return client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids} | more)


def stored(settings) -> list[str]:
    """The names of all files of the store."""
    return sorted(path.name for path in settings.blobs_dir.rglob("*") if path.is_file())


def assert_refused(answer, code: str, *, param: str | None, status: int = 400) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text


def test_the_official_client_uploads_in_chunks(sdk, settings, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(CONTENT)
    md5 = hashlib.md5(CONTENT).hexdigest()  # noqa: S324
    upload = sdk.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=300, md5=md5
    )
    assert (upload.status, upload.file.filename, upload.file.status) == (
        "completed",
        "rows.jsonl",
        "uploaded",
    )
    assert sdk.files.content(upload.file.id).read() == CONTENT
    assert stored(settings) == [hashlib.sha256(CONTENT).hexdigest()]


SAID = {"format": "question", "column_map": {"question": "Frage"}, "max_invalid_fraction": 0.5}


def test_what_is_said_of_the_rows_is_kept_until_they_have_come(sdk, client):
    upload = sdk.uploads.create(
        filename="rows.csv", purpose="fine-tune", mime_type="text/csv", bytes=1000, extra_body=SAID
    )
    assert client.get(f"/v1/uploads/{upload.id}").json().items() >= SAID.items()
    made = complete(client, upload.id, send_all(client, upload.id, *HALVES)).json()["file"]
    assert made.items() >= SAID.items()
    assert client.get(f"/v1/files/{made['id']}").json() == made


def test_nothing_need_be_said_of_the_rows(client):
    unsaid = {"format": None, "column_map": None, "max_invalid_fraction": 0.0}
    upload_id = begin(client, purpose="fine-tune", **dict.fromkeys(SAID), filename="rows.txt")
    assert client.get(f"/v1/uploads/{upload_id}").json().items() >= unsaid.items()
    made = complete(client, upload_id, send_all(client, upload_id, *HALVES)).json()["file"]
    assert made.items() >= unsaid.items()


@pytest.mark.parametrize(
    ("said", "param", "part"),
    [
        ({"format": "alpacca"}, "format", "did you mean 'alpaca'"),
        ({"format": 1}, "format", "string"),
        ({"format": "alpaca", "purpose": "batch"}, "format", "'fine-tune' only"),
        ({"format": "alpaca", "filename": "rows.txt"}, "format", "plain_text"),
        ({"column_map": {"qestion": "Frage"}}, "column_map", "did you mean 'question'"),
        ({"column_map": {"question": 1}}, "column_map", "must be an object of texts"),
        ({"column_map": '{"question": "Frage"}'}, "column_map", "must be an object of texts"),
        ({"column_map": {"question": "a", "system": "a"}}, "column_map", "same column"),
        *(
            ({"max_invalid_fraction": fraction}, "max_invalid_fraction", "must be a number from 0 up to 1")
            for fraction in (1, -0.1, "0.1", True, [0.1])
        ),
    ],
)
def test_what_cannot_be_said_of_rows(client, said, param, part):
    answer = client.post("/v1/uploads", json=WISHES | {"purpose": "fine-tune"} | said)
    assert_refused(answer, "invalid_value", param=param)
    assert part in answer.json()["error"]["message"]


def test_the_same_key_with_another_word_on_the_rows_is_another_request(client):
    def begin_once(**said):
        body = WISHES | {"purpose": "fine-tune"} | said
        return client.post("/v1/uploads", json=body, headers={"Idempotency-Key": "rows"})

    first = begin_once(**SAID)
    again = begin_once(**SAID)
    assert (again.json(), again.headers["idempotency-replayed"]) == (first.json(), "true")
    assert begin_once(**SAID | {"max_invalid_fraction": 0.1}).status_code == 400


def test_parts_come_in_any_order_and_can_be_seen(client, world):
    upload_id = begin(client, purpose="fine-tune")
    late, early = send_all(client, upload_id, *HALVES[::-1])
    seen = client.get(f"/v1/uploads/{upload_id}").json()
    assert seen.items() >= {"status": "pending", "bytes": 1000, "file": None, "purpose": "fine-tune"}.items()
    assert seen["expires_at"] == seen["created_at"] + 3600
    told = [(part["id"], part["bytes"], part["sha256"]) for part in seen["parts"]]
    assert told == [
        (late, 400, hashlib.sha256(HALVES[1]).hexdigest()),
        (early, 600, hashlib.sha256(HALVES[0]).hexdigest()),
    ]
    done = complete(client, upload_id, [early, late]).json()
    assert (done["status"], done["parts"]) == ("completed", [])
    assert client.get(f"/v1/uploads/{upload_id}").json() == done
    assert client.get(f"/v1/files/{done['file']['id']}").json() == done["file"]
    assert done["file"]["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    world.check_file(done["file"]["id"])  # its check is queued


def test_the_same_bytes_are_the_same_part(client, settings):
    upload_id = begin(client, bytes=30)
    first, again = send(client, upload_id, b"x" * 10), send(client, upload_id, b"x" * 10)
    assert first.json() == again.json()
    assert len(stored(settings)) == 1
    part = first.json()["id"]
    done = complete(client, upload_id, [part, part, part]).json()
    assert client.get(f"/v1/files/{done['file']['id']}/content").content == b"x" * 30


def test_a_completion_sent_again_answers_again(client):
    upload_id = begin(client)
    ids = send_all(client, upload_id, *HALVES)
    done = complete(client, upload_id, ids)
    assert complete(client, upload_id, ids).json() == done.json()
    assert len(client.get("/v1/files").json()["data"]) == 1
    assert_refused(complete(client, upload_id, ids[::-1]), "upload_not_pending", param="upload_id")
    assert_refused(send(client, upload_id, b"x"), "upload_not_pending", param="upload_id")
    assert_refused(client.post(f"/v1/uploads/{upload_id}/cancel"), "upload_not_pending", param="upload_id")


def test_a_refused_completion_leaves_the_upload_as_it_was(client):
    upload_id = begin(client)
    ids = send_all(client, upload_id, *HALVES)
    before = client.get(f"/v1/uploads/{upload_id}").json()
    wrong_md5 = complete(client, upload_id, ids[::-1], md5=hashlib.md5(CONTENT).hexdigest())  # noqa: S324
    assert_refused(wrong_md5, "digest_mismatch", param="md5")
    assert_refused(complete(client, upload_id, ids[:1]), "upload_size_mismatch", param="part_ids")
    assert_refused(complete(client, upload_id, [*ids, ids[0]]), "upload_size_mismatch", param="part_ids")
    assert_refused(complete(client, upload_id, [*ids, "part_x"]), "invalid_value", param="part_ids")
    assert_refused(complete(client, upload_id, []), "invalid_value", param="part_ids")
    assert_refused(complete(client, upload_id, ids, md5="x"), "invalid_value", param="md5")
    assert client.get(f"/v1/uploads/{upload_id}").json() == before
    assert client.get("/v1/files").json()["data"] == []
    assert complete(client, upload_id, ids, md5=hashlib.md5(CONTENT).hexdigest().upper()).status_code == 200  # noqa: S324


def test_parts_of_another_upload_are_unknown(client):
    mine, other = begin(client), begin(client)
    ids = send_all(client, other, *HALVES)
    assert_refused(complete(client, mine, ids), "invalid_value", param="part_ids")


def test_parts_beyond_the_bytes_of_the_upload_are_refused(client, settings):
    upload_id = begin(client)
    send_all(client, upload_id, HALVES[0])
    assert_refused(send(client, upload_id, b"x" * 401), "upload_size_mismatch", param="data")
    assert len(stored(settings)) == 1
    assert send(client, upload_id, b"x" * 400).status_code == 200


@pytest.mark.parametrize(
    ("parts", "code", "param"),
    [
        ({"data": ("blob", b"")}, "empty_file", "data"),
        ({"file": ("blob", b"x")}, "unknown_parameter", "file"),
        ({"data": ("blob", b"x"), "more": (None, b"y")}, "unknown_parameter", "more"),
    ],
)
def test_refused_parts_leave_nothing(client, settings, parts, code, param):
    upload_id = begin(client)
    assert_refused(client.post(f"/v1/uploads/{upload_id}/parts", files=parts), code, param=param)
    assert stored(settings) == []


def test_a_part_has_a_limit_of_its_own(client, settings, monkeypatch):
    monkeypatch.setattr(api_uploads, "PART_MAX_BYTES", 100)
    upload_id = begin(client)
    assert_refused(send(client, upload_id, b"x" * 101), "file_too_large", param="data", status=413)
    assert send(client, upload_id, b"x" * 100).status_code == 200
    assert len(stored(settings)) == 1


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"bytes": 200_001}, 413, "file_too_large", "bytes"),
        ({"bytes": 0}, 400, "invalid_value", "bytes"),
        ({"bytes": "1000"}, 400, "invalid_value", "bytes"),
        ({"purpose": "mischief"}, 400, "invalid_value", "purpose"),
        ({"filename": ""}, 400, "invalid_value", "filename"),
        ({"filename": "a\x00b"}, 400, "invalid_value", None),
        ({"part_size": 3}, 400, "unknown_parameter", "part_size"),
        (
            {"expires_after": {"anchor": "created_at", "seconds": 60}},
            400,
            "invalid_value",
            "expires_after.seconds",
        ),
    ],
)
def test_impossible_uploads(client, changes, status, code, param):
    assert_refused(client.post("/v1/uploads", json=WISHES | changes), code, param=param, status=status)


@pytest.mark.parametrize(
    ("given", "shown"),
    [("../../etc/x", "x"), ("n" * 4096, "n" * 255), ("..", "upload"), ("a\x1bb.csv", "ab.csv")],
)
def test_names_are_only_labels(client, settings, given, shown):
    upload_id = begin(client, filename=given)
    done = complete(client, upload_id, send_all(client, upload_id, *HALVES)).json()
    assert done["filename"] == done["file"]["filename"] == shown
    assert stored(settings) == [done["file"]["sha256"]]


def test_the_file_expires_when_the_upload_asked_for_it(client):
    upload_id = begin(client, expires_after={"anchor": "created_at", "seconds": 7200})
    file = complete(client, upload_id, send_all(client, upload_id, *HALVES)).json()["file"]
    assert file["expires_at"] == file["created_at"] + 7200


def test_a_cancelled_upload_leaves_nothing(client, settings):
    upload_id = begin(client)
    ids = send_all(client, upload_id, *HALVES)
    cancelled = client.post(f"/v1/uploads/{upload_id}/cancel").json()
    assert (cancelled["status"], cancelled["parts"]) == ("cancelled", [])
    assert client.post(f"/v1/uploads/{upload_id}/cancel").json() == cancelled
    assert stored(settings) == []
    assert_refused(complete(client, upload_id, ids), "upload_not_pending", param="upload_id")
    assert_refused(send(client, upload_id, b"x"), "upload_not_pending", param="upload_id")


def test_an_upload_whose_time_is_over_is_collected(client, world, settings):
    upload_id, kept = begin(client), begin(client)
    ids = send_all(client, upload_id, *HALVES)
    send_all(client, kept, HALVES[0])
    with world.database.write() as session:
        session.execute(update(Upload).where(Upload.id == upload_id).values(expires_at=1.0))
    assert client.get(f"/v1/uploads/{upload_id}").json()["status"] == "expired"  # before anybody came by
    assert_refused(complete(client, upload_id, ids), "upload_not_pending", param="upload_id")
    assert len(stored(settings)) == 3

    upkeep.run(world.database, settings)

    assert stored(settings) == [hashlib.sha256(HALVES[0]).hexdigest()]
    assert client.get(f"/v1/uploads/{upload_id}").json().items() >= {"status": "expired", "parts": []}.items()
    assert client.get(f"/v1/uploads/{kept}").json()["status"] == "pending"


def test_changed_bytes_of_a_part_are_noticed_and_can_be_sent_again(client, settings):
    upload_id = begin(client)
    ids = send_all(client, upload_id, *HALVES)
    (path,) = settings.blobs_dir.rglob(hashlib.sha256(HALVES[0]).hexdigest())
    path.write_bytes(b"?" + HALVES[0][1:])
    answer = complete(client, upload_id, ids)
    assert_refused(answer, "content_corrupt", param=None, status=500)
    assert ids[0] in answer.json()["error"]["message"]
    path.unlink()
    assert_refused(complete(client, upload_id, ids), "content_corrupt", param=None, status=500)
    assert send_all(client, upload_id, HALVES[0]) == ids[:1]
    done = complete(client, upload_id, ids).json()
    assert blobs.path_of(settings.blobs_dir, "org-default", done["file"]["sha256"]).read_bytes() == CONTENT


def test_a_deleted_file_is_no_longer_told(client):
    upload_id = begin(client)
    done = complete(client, upload_id, send_all(client, upload_id, *HALVES)).json()
    assert client.delete(f"/v1/files/{done['file']['id']}").status_code == 200
    assert client.get(f"/v1/uploads/{upload_id}").json() == done | {"file": None}


def test_a_create_sent_blindly_again_is_one_upload(client):
    first = client.post("/v1/uploads", json=WISHES)
    again = client.post("/v1/uploads", json=WISHES, headers={"x-stainless-retry-count": "1"})
    assert first.json() == again.json()
    assert begin(client) != first.json()["id"]


def test_another_tenants_parts_make_nothing(client, as_stranger):
    upload_id = begin(client)
    ids = send_all(client, upload_id, *HALVES)
    theirs = client.post("/v1/uploads", json=WISHES, headers=as_stranger).json()["id"]
    answer = client.post(f"/v1/uploads/{theirs}/complete", json={"part_ids": ids}, headers=as_stranger)
    assert_refused(answer, "invalid_value", param="part_ids")
