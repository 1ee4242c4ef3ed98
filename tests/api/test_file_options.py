"""Files that expire, result files as OpenAI sends them."""

import base64

import pytest

from db import files
from db.blobs import BlobWriter


def upload(client, **fields):
    return client.post("/v1/files", data={"purpose": "batch"} | fields, files={"file": ("a.jsonl", b"{}\n")})


@pytest.mark.parametrize("seconds", [3600, 2_592_000])
def test_a_file_expires_when_it_was_asked_to(client, seconds):
    made = upload(
        client, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": str(seconds)}
    ).json()
    assert made["expires_at"] == made["created_at"] + seconds
    assert client.get(f"/v1/files/{made['id']}").json() == made
    assert upload(client).json()["expires_at"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}, "expires_after[seconds]"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"},
            "expires_after[seconds]",
        ),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "1e4"}, "expires_after[seconds]"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "٣٦٠٠"},
            "expires_after[seconds]",
        ),
    ],
)
def test_impossible_expiries(client, fields, param):
    answer = upload(client, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", param)
    assert client.get("/v1/files").json()["data"] == []


def test_an_unknown_field_comes_with_the_nearest_known_one(client):
    answer = upload(client, purpos="batch")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "purpos")
    assert "Did you mean 'purpose'?" in answer.json()["error"]["message"]


@pytest.mark.parametrize("size", [1, 2, 3, 3 * 256 * 1024, 3 * 256 * 1024 + 1, 2_000_000])
def test_base64_only_when_asked_for(client, world, settings, size):
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    with BlobWriter(settings.blobs_dir, "org-default") as writer:
        writer.write(content)
        writer.sync()
        with world.database.write() as session:
            made = files.create(
                session, writer, org_id="org-default", filename="m.csv", purpose=files.RESULTS_PURPOSE
            )
    path = f"/v1/files/{made.id}/content"
    assert client.get(path).content == content
    assert base64.b64decode(client.get(f"{path}?encoding=base64").text, validate=True) == content
    assert client.get(f"{path}?encoding=hex").json()["error"]["param"] == "encoding"
    assert client.get(f"/v1/files?purpose={files.RESULTS_PURPOSE}").json()["data"][0]["id"] == made.id
    assert upload(client, purpose=files.RESULTS_PURPOSE).status_code == 400


def upload_rows(client, name="rows.csv", **fields):
    return client.post("/v1/files", data={"purpose": "fine-tune"} | fields, files={"file": (name, b"a,b\n")})


def test_what_is_said_of_the_rows_is_echoed(client):
    made = upload_rows(client, format="question", column_map='{"question": "Frage"}').json()
    assert (made["format"], made["column_map"]) == ("question", {"question": "Frage"})
    assert client.get(f"/v1/files/{made['id']}").json() == made
    bare = upload_rows(client).json()
    assert (bare["format"], bare["column_map"]) == (None, None)


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"format": "alpacca"}, "format", "did you mean 'alpaca'"),
        ({"column_map": '{"qestion": "Frage"}'}, "column_map", "did you mean 'question'"),
        ({"column_map": "question"}, "column_map", "must be an object"),
        ({"column_map": '{"question": "\\ud800"}'}, "column_map", "half of a surrogate pair"),
        ({"column_map": '{"\\ud800": "a"}'}, "column_map", "no key"),
        ({"column_map": '{"question": 1}'}, "column_map", "must be an object"),
        ({"column_map": "null"}, "column_map", "must be an object"),
        ({"column_map": ""}, "column_map", "must be an object"),
        ({"column_map": "{}", "column_map[question]": "a"}, "column_map", "must be an object"),
        ({"column_map": "[" * 60_000}, "column_map", "must be an object"),
        ({"column_map[question]": "a", "column_map[system]": "a"}, "column_map", "same column"),
        ({"format": "alpaca", "purpose": "batch"}, "format", "'fine-tune' only"),
        ({"name": "rows.txt", "format": "alpaca"}, "format", "plain_text"),
    ],
)
def test_what_cannot_be_said_of_rows(client, fields, param, part):
    answer = upload_rows(client, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", param)
    assert part in error["message"]
    assert client.get("/v1/files").json()["data"] == []


REPORT = {
    "rows": 3,
    "rows_used": 2,
    "rows_refused": 1,
    "blank_lines": 0,
    "format": "messages",
    "kind": "conversation",
    "whole": True,
    "max_invalid_fraction": 0.5,
    "accepted": True,
    "reasons": {"not_json": 1},
    "errors": [{"line": 2, "code": "not_json", "message": "the line is not JSON"}],
    "notices": {"empty_turn": {"count": 1, "lines": [3]}},
    "duplicates": {"count": 1, "first": [{"line": 3, "same_as": 1}]},
    "sample": {
        "rows": 2,
        "near_duplicates": {"count": 1, "first": [{"line": 3, "near": 1, "similarity": 0.9}]},
        "scripts": {"Latin": 1.0},
    },
}


def test_the_report_of_a_file_is_there_once_it_is_checked(client, world):
    file_id = upload_rows(client, max_invalid_fraction="0.5").json()["id"]
    early = client.get(f"/v1/files/{file_id}/report")
    assert (early.status_code, early.json()["error"]["code"]) == (404, "report_not_ready")
    assert int(early.headers["retry-after"]) > 0
    world.check_file(file_id, report=REPORT)
    answer = client.get(f"/v1/files/{file_id}/report")
    assert answer.json() == {"object": "file.report", "file_id": file_id} | REPORT
    file = client.get(f"/v1/files/{file_id}").json()
    assert (file["status"], file["rows"], file["max_invalid_fraction"]) == ("processed", 2, 0.5)


def test_files_without_a_check_of_their_own_have_no_report(client, world):
    broken = upload_rows(client).json()["id"]
    world.check_file(broken, error="The file could not be checked.", report={"rows": 1})
    for file_id in (broken, upload(client).json()["id"]):
        answer = client.get(f"/v1/files/{file_id}/report")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_report")


@pytest.mark.parametrize("fraction", ["1", "-0.1", "a", "", "nan", "1e-3", "0.\u0665"])
def test_impossible_tolerances(client, fraction):
    answer = upload_rows(client, max_invalid_fraction=fraction)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_invalid_fraction")
