"""Several training files through REST: of each as much is trained as was asked for."""

import json
from typing import Any

import httpx
import pytest

from tests.stack import Stack, wait_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
SIZES, WEIGHTS, TAKEN = (24, 8), (1, 3), [8, 24]  # as many rows as the files have together, 1 to 3
SHAPED = {"max_length": 128}


def write_rows(word: str, count: int) -> str:
    """Rows with equally many tokens each."""
    ask = [{"role": "user", "content": f"What helps against {word}?"}]
    rows = [{"messages": [*ask, {"role": "assistant", "content": f"Rest {n} hours."}]} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def upload(http: httpx.Client, name: str, text: str) -> str:
    answer = http.post("/files", data={"purpose": "fine-tune"}, files={"file": (name, text)})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def fetch(http: httpx.Client, path: str, **query: Any) -> dict[str, Any]:
    """The answer once a worker has given it."""

    def ask() -> dict[str, Any] | None:
        answer = http.get(path, params=query)
        return answer.json() if answer.status_code == 200 else None

    return wait_for(ask, within_s=120, what=path, every_s=0.5)


def train(http: httpx.Client, files: list[str]) -> dict[str, Any]:
    hyperparameters = SHAPED | {"n_epochs": 1, "batch_size": 8, "learning_rate": 5e-3}
    mixture = [{"file": file, "weight": weight} for file, weight in zip(files, WEIGHTS, strict=True)]
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    made = http.post(
        "/fine_tuning/jobs", json={"model": "tiny", "training_files": mixture, "method": method, "seed": 7}
    )
    assert made.status_code == 200, made.text

    def over() -> dict[str, Any] | None:
        job = http.get(f"/fine_tuning/jobs/{made.json()['id']}?wait=30").json()
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    return wait_for(over, within_s=240, what="the job on two files")


def test_a_job_trains_on_two_files_in_the_proportion_asked_for(stack: Stack) -> None:
    with stack.http() as http:
        files = [
            upload(http, f"{word}.jsonl", write_rows(word, count))
            for word, count in zip(("a dry cough that does not end", "fever"), SIZES, strict=True)
        ]
        job = train(http, files)
        assert job["status"] == "succeeded", job["error"]
        events = http.get(f"/fine_tuning/jobs/{job['id']}/events?limit=1000").json()["data"]
        counted = [fetch(http, f"/files/{file}/tokens", model="tiny", wait=60, **SHAPED) for file in files]

    assert [part["file"] for part in job["training_files"]] == files
    told = [event["data"] for event in events if event["data"].get("code") == "mixed"]
    assert [(data["taken"], data["of"]) for data in told] == [(TAKEN, [*SIZES])]
    # The trainer saw no other rows: those of a file are of one length, which differs from file to file.
    lengths = [count["tokens"] // count["rows"] for count in counted]
    assert [count["percentiles"]["50"] for count in counted] == lengths
    assert lengths[0] != lengths[1]
    assert job["trained_tokens"] == sum(n * length for n, length in zip(TAKEN, lengths, strict=True))
