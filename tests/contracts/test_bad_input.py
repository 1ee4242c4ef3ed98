"""Bad input gets a clear answer and loses nothing: what was there before is there after, byte for byte."""

import gzip
import json
from collections.abc import Iterator

import httpx
import pytest

from tests.api.cli_peer import run
from tests.stack import Stack, wait_for

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
GOOD = json.dumps(CHAT).encode() + b"\n"
COLUMNS = {
    "format": "prompt_completion",
    "column_map": '{"prompt": "Frage", "completion": "Antwort"}',
}
LONG = {"messages": [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with stack.http() as client:
        yield client


def upload(
    http: httpx.Client, content: bytes, *, name: str = "rows.jsonl", purpose: str = "fine-tune", **said: str
) -> str:
    answer = http.post("/files", data={"purpose": purpose} | said, files={"file": (name, content)})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def check(http: httpx.Client, file_id: str) -> dict:
    """The file once its rows are checked."""

    def checked() -> dict | None:
        file = http.get(f"/files/{file_id}").json()
        return None if file["status"] == "uploaded" else file

    return wait_for(checked, within_s=150, what="check of a file")


@pytest.fixture(scope="module")
def good(http: httpx.Client) -> str:
    file_id = upload(http, GOOD * 10)
    assert check(http, file_id)["status"] == "processed"
    return file_id


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (GOOD + b'{"messages": [{"role": "user", "con\n', 2, "not JSON"),
        (GOOD * 2 + b'{"messages": [{"role": "user", "content": "\xff"}]}\n', 3, "not UTF-8"),
        (GOOD + b'{"messages": [{"role": "user", "content": "a"}]}\n', 2, "no assistant message"),
        (b" \n\n", 1, "no rows"),
        (b'{"mesages": []}\n', 1, "did you mean 'messages'?"),
        (GOOD.replace(b"a", b"\0"), 1, "NUL"),
        (GOOD.decode().encode("utf-16"), 1, "UTF-16"),
    ],
)
def test_a_bad_row_is_named_by_its_line(http, good, content, line, words):
    file = check(http, upload(http, content))
    assert file["status"] == "error"
    assert file["status_details"].startswith(f"Line {line}: ")
    assert words in file["status_details"]
    refused = http.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": file["id"]})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (
        400,
        "invalid_training_file",
        "training_file",
    )
    assert words in error["message"]
    beside = http.post(
        "/fine_tuning/jobs", json={"model": "tiny", "training_file": good, "validation_file": file["id"]}
    )
    assert beside.json()["error"]["param"] == "validation_file"


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"model": "unknown"}, 404, "model_not_found", "model"),
        ({"training_file": "file-unknown"}, 404, "not_found", "training_file"),
        ({"validation_file": "file-unknown"}, 404, "not_found", "validation_file"),
        ({"training_file": None}, 400, "missing_required_parameter", "training_file"),
        ({"suffix": "s" * 65}, 400, "invalid_value", "suffix"),
        ({"suffix": "a:b"}, 400, "invalid_value", "suffix"),
        ({"seed": 2**31}, 400, "invalid_value", "seed"),
        ({"metadata": {"k": "v" * 513}}, 400, "invalid_value", "metadata.k"),
        ({"metadata": {str(n): "v" for n in range(17)}}, 400, "invalid_value", "metadata"),
        ({"integrations": [{"type": "other"}]}, 400, "invalid_value", "integrations.0.type"),
        ({"method": {"type": "telepathy"}}, 400, "unsupported_value", "method.type"),
        ({"hyperparameters": {"n_epochs": 51}}, 400, "invalid_value", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 0}}, 400, "invalid_value", "hyperparameters.batch_size"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 0}},
            400,
            "invalid_value",
            "hyperparameters.learning_rate_multiplier",
        ),
        ({"hyperparameters": {"n_epoch": 1}}, 400, "unknown_parameter", "hyperparameters.n_epoch"),
        ({"sufix": "v1"}, 400, "unknown_parameter", "sufix"),
    ],
)
def test_a_refused_job_leaves_none(http, good, changes, status, code, param):
    before = http.get("/fine_tuning/jobs").json()
    body = {"model": "tiny", "training_file": good} | changes
    answer = http.post("/fine_tuning/jobs", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["message"]
    assert http.get("/fine_tuning/jobs").json() == before


def test_a_file_for_something_else_is_no_training_file(http):
    file_id = upload(http, GOOD, purpose="batch")
    answer = http.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_file_purpose")


def test_bodies_that_are_no_requests(http, stack):
    before = http.get("/files").json()

    def refusal(content, **headers: str) -> tuple[int, str]:
        answer = http.post("/fine_tuning/jobs", content=content, headers=headers)
        return answer.status_code, answer.json()["error"]["code"]

    json_type = {"content-type": "application/json"}
    assert refusal(b'{"model": ', **json_type) == (400, "invalid_json")
    assert refusal(b"[]", **json_type) == (400, "invalid_value")
    assert refusal(b'{"model": "\xff"}', **json_type)[0] == 400
    whole = b'{"model": "' + b"m" * (17 << 20) + b'"}'
    assert refusal(whole, **json_type) == (413, "request_too_large")
    pieces = (whole[start : start + (1 << 20)] for start in range(0, len(whole), 1 << 20))
    assert refusal(pieces, **json_type) == (413, "request_too_large")  # without a length
    empty = http.post("/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b"")})
    assert (empty.status_code, empty.json()["error"]["code"]) == (400, "empty_file")
    wrong = httpx.get(f"{stack.url}/models", headers={"authorization": "Bearer rsd_user_x"}, trust_env=False)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    assert http.get("/files").json() == before
    assert list((stack.home / "blobs" / "incoming").iterdir()) == []


def test_what_may_be_wrong_is_reported_by_its_line(http):
    table = gzip.compress(b"Frage,Antwort\n" + b"Q,A\n" * 8 + b"Q,\nQ,A,B\n")
    said = {"name": "rows.csv.gz"} | COLUMNS
    refused = check(http, upload(http, table, **said))
    assert refused["status"] == "error"
    assert refused["status_details"] == "Line 10: 'completion' is empty (1 more lines have errors)"
    file = check(http, upload(http, table, **said, max_invalid_fraction="0.2"))
    assert (file["status"], file["rows"]) == ("processed", 8)
    report = http.get(f"/files/{file['id']}/report").json()
    assert [(error["line"], error["code"]) for error in report["errors"]] == [
        (10, "empty_value"),
        (11, "columns"),
    ]
    assert (report["rows_used"], report["duplicates"]["count"]) == (8, 7)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", GOOD * 5 + json.dumps(LONG).encode() + b'\n\n{"mesages": []}\n', {}),
        (
            "rows.csv.gz",
            gzip.compress(b"Frage,Antwort\nQ,A\nQ,\nQ,B\n"),
            COLUMNS | {"max_invalid_fraction": "0.4"},
        ),
        ("rows.parquet", b"PAR1", {}),
    ],
    ids=["jsonl", "csv.gz", "parquet"],  # the bytes of a gzip hold the time, and workers must agree on names
)
def test_a_file_is_checked_on_ones_own_machine_as_on_the_server(http, tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    file = check(http, upload(http, content, name=name, **said))
    report = http.get(f"/files/{file['id']}/report").json()
    columns = json.loads(said.get("column_map", "{}")).items()
    options = [f"--column={key}={column}" for key, column in columns]
    options += [
        f"--{key.replace('_', '-')}={said[key]}" for key in ("format", "max_invalid_fraction") if key in said
    ]
    local = run("data", "check", str(path), *options, "--json")
    assert local.exit_code == (0 if file["status"] == "processed" else 1), local.stderr
    found = json.loads(local.stdout)
    assert found.pop("sha256") == file["sha256"]
    assert (report.pop("object"), report.pop("file_id")) == ("file.report", file["id"])
    assert found == report


def test_tokens_are_counted_on_ones_own_machine_as_on_the_server(http, tiny_model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD * 5 + json.dumps(LONG).encode() + b"\n")
    file = check(http, upload(http, path.read_bytes()))
    asked = {"model": "tiny", "max_length": 64, "wait": 60}
    counted = http.get(f"/files/{file['id']}/tokens", params=asked).json()
    local = run("data", "check", str(path), f"--model={tiny_model}", "--max-length=64", "--json")
    assert local.exit_code == 0, local.stderr
    assert (counted.pop("file_id"), counted.pop("model"), counted.pop("object")) == (
        file["id"],
        "tiny",
        "file.tokens",
    )
    assert json.loads(local.stdout)["tokens"] == counted
    assert (counted["examples"], counted["truncated"]) == (6, 1)


def test_nothing_left_to_learn_after_truncation_fails_the_job_and_says_so(http):
    file_id = upload(http, (json.dumps(LONG) + "\n").encode() * 10)
    assert check(http, file_id)["status"] == "processed"  # only a model's tokenizer can tell
    made = http.post(
        "/fine_tuning/jobs",
        json={"model": "tiny", "training_file": file_id, "hyperparameters": {"max_length": 16}},
    ).json()
    failed = wait_for(
        lambda: job if (job := http.get(f"/fine_tuning/jobs/{made['id']}").json())["error"] else None,
        within_s=150,
        what="the job to fail",
    )
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "invalid_training_file"
    assert failed["error"]["param"] == "training_file"
    assert "max_length" in failed["error"]["message"]
    again = http.post(f"/fine_tuning/jobs/{made['id']}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "job_not_cancellable")
