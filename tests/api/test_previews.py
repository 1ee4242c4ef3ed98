"""Previews and token statistics over HTTP: asked once, answered by a worker, one tenant's only."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, update

from api.main import create_app
from db import files, previews, registry, tasks
from db.models import Preview
from db.sources import HubSource
from db.work_models import Task
from tests.api.conftest import ORG, OTHER_ORG
from tests.stack import wait_for
from trainers.specs import Layout

ROW = {
    "row": 1,
    "line": 1,
    "used": True,
    "error": None,
    "truncated": False,
    "tokens": 2,
    "trainable_tokens": 1,
    "full_tokens": 2,
    "texts": [
        {
            "name": "text",
            "text": "Hi🤒",
            "tokens": [
                {"id": 5, "text": "Hi", "trained": False},
                {"id": 6, "text": "🤒", "trained": True, "bytes": "f0 9f a4 92"},
            ],
            "tokens_left_out": 0,
        }
    ],
}
SEEN = {"method": "supervised", "hyperparameters": {"max_length": 2048}, "notes": []}
ROWS = SEEN | {"rows": [ROW]}
TOKENS = SEEN | {
    "rows": 1,
    "measured_rows": 1,
    "sampled": False,
    "seed": None,
    "refused": 0,
    "refused_lines": [],
    "examples": 1,
    "dropped": 0,
    "dropped_lines": [],
    "truncated": 0,
    "truncated_share": 0.0,
    "tokens": 2,
    "trainable_tokens": 1,
    "trainable_share": 0.5,
    "percentiles": {"50": 2},
    "histogram": [{"up_to": 32, "count": 1}, {"up_to": None, "count": 0}],
}


def answer_one(world, answer: dict[str, Any]) -> dict[str, Any]:
    """What a worker does with the question that waits; what was asked."""
    lease = world.claim("cpu")
    assert lease.kind == "preview"
    with tasks.fenced(world.database, lease) as session:
        asked = session.get_one(Preview, lease.subject_id).request["asked"]
        tasks.finish(session, lease, outcome="done")
        previews.record(session, lease.subject_id, answer)
    return asked


def count(world, entity: Any, *conditions: Any) -> int:
    with world.database.read() as session:
        return session.scalar(select(func.count()).select_from(entity).where(*conditions)) or 0


@pytest.fixture
def model(world) -> str:
    return world.base_model()


@pytest.fixture
def remote(world, serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A client of the app behind a real server, which notices those that leave."""
    monkeypatch.setattr("api.watch._TICK_S", 0.02)
    headers = {"authorization": f"Bearer {world.user}"}
    with (
        serve(create_app(world.settings, world.database)) as address,
        httpx.Client(base_url=address, headers=headers, trust_env=False, timeout=30) as client,
    ):
        yield client


@pytest.mark.parametrize(("kind", "answer"), [("preview", ROWS), ("tokens", TOKENS)])
def test_the_first_waits_and_the_second_is_answered_at_once(remote, world, model, kind, answer):
    file_id = world.file()
    params = {"model": model, "wait": 20}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(remote.get, f"/v1/files/{file_id}/{kind}", params=params)
        waits = Task.kind == "preview"
        wait_for(lambda: count(world, Task, waits), within_s=10, what="the question", every_s=0.01)
        answer_one(world, answer)
        found = first.result(timeout=10)  # woken by the answer, not by the end of its patience
    assert found.status_code == 200, found.text
    assert found.json() == answer | {"object": f"file.{kind}", "file_id": file_id, "model": model}
    again = remote.get(f"/v1/files/{file_id}/{kind}", params=params | {"wait": 0})
    assert again.json() == found.json()
    assert count(world, Task, waits) == 1


def test_what_is_not_there_yet_is_to_be_asked_again(client, world, model):
    file_id = world.file()
    for _ in range(2):
        answer = client.get(f"/v1/files/{file_id}/preview", params={"model": model, "wait": 0})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "preview_pending")
        assert answer.headers["retry-after"] == "2"
    assert count(world, Preview) == 1


def test_what_is_asked_reaches_the_worker(client, world, model):
    query = {
        "model": model,
        "row": [7, 2, 7],
        "max_length": 64,
        "train_on_inputs": True,
        "template": "qwen",
        "wait": 0,
    }
    client.get(f"/v1/files/{world.file()}/preview", params=query)
    assert answer_one(world, ROWS) == {
        "layout": dataclasses.asdict(Layout()),
        "method": "supervised",
        "hyperparameters": {"max_length": 64, "train_on_inputs": True, "chat_template": "qwen"},
        "rows": [2, 7],
    }


def test_the_same_question_in_other_words_is_the_same_and_any_other_is_not(client, world, model):
    file_id, twin = world.file(), world.file()  # of the same bytes

    def ask(file: str = file_id, kind: str = "preview", **query: Any) -> None:
        client.get(f"/v1/files/{file}/{kind}", params={"model": model, "wait": 0} | query)

    ask()
    ask(twin, method="supervised", max_length=2048, train_on_inputs=False)
    assert count(world, Preview) == 1
    for n, query in enumerate(
        [{"row": 1}, {"max_length": 64}, {"method": "dpo"}, {"kind": "tokens"}, {"template": "qwen"}], 2
    ):
        ask(**query)
        assert count(world, Preview) == n
    with world.database.write() as session:
        registry.get(session, model, org_id=ORG).digest = "another"
    ask()
    assert count(world, Preview) == 7


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"model": None}, "model"),
        ({"max_lenght": 64}, "max_lenght"),
        ({"max_length": 3}, "max_length"),
        ({"max_length": "long"}, "max_length"),
        ({"block_size": 64}, "block_size"),
        ({"method": "dpo", "train_on_inputs": True}, "train_on_inputs"),
        ({"chat_template": "klingon"}, "chat_template"),
        ({"template": "qwen", "chat_template": "vicuna"}, "template"),
        ({"method": "dancing"}, "method"),
        ({"row": 0}, "row.0"),
        ({"row": list(range(1, 22))}, "row"),
        ({"wait": 61}, "wait"),
    ],
)
def test_wrong_questions_are_refused(client, world, model, query, param):
    params = {name: value for name, value in ({"model": model} | query).items() if value is not None}
    answer = client.get(f"/v1/files/{world.file()}/preview", params=params)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert count(world, Preview) == 0


def test_what_a_worker_finds_wrong_is_the_users(client, world, model):
    path, params = f"/v1/files/{world.file()}/preview", {"model": model, "row": 9, "wait": 0}
    client.get(path, params=params)
    answer_one(world, {"error": {"code": "invalid_value", "message": "the file has 1 rows", "param": "row"}})
    for _ in range(2):
        answer = client.get(path, params=params)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "row")


def test_bytes_that_have_changed_are_our_fault(client, world, model):
    path, params = f"/v1/files/{world.file()}/tokens", {"model": model, "wait": 0}
    client.get(path, params=params)
    answer_one(world, {"error": {"code": "content_corrupt", "message": "They have.", "param": None}})
    answer = client.get(path, params=params)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "content_corrupt")


def test_a_worker_that_breaks_is_our_fault_and_is_tried_again_later(client, world, model):
    path, params = f"/v1/files/{world.file()}/preview", {"model": model, "wait": 0}
    client.get(path, params=params)
    lease = world.claim("cpu")
    with tasks.fenced(world.database, lease) as session:
        tasks.finish(session, lease, outcome="failed")
        previews.fail(session, lease.subject_id)
    answer = client.get(path, params=params)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "preview_failed")
    with world.database.write() as session:
        session.execute(update(Preview).values(expires_at=Preview.expires_at - previews.FAILED_KEPT_S))
    assert client.get(path, params=params).status_code == 503
    assert world.claim("cpu").subject_id != lease.subject_id


@pytest.mark.parametrize("kind", ["preview", "tokens"])
def test_files_models_and_answers_of_others_are_not_there(client, world, model, as_stranger, kind):
    file_id, theirs = world.file(), world.file(org_id=OTHER_ORG)
    params = {"model": model, "wait": 0}
    client.get(f"/v1/files/{file_id}/{kind}", params=params)
    answer_one(world, ROWS if kind == "preview" else TOKENS)
    assert client.get(f"/v1/files/{file_id}/{kind}", params=params).status_code == 200

    hidden = client.get(f"/v1/files/{file_id}/{kind}", params=params, headers=as_stranger)
    assert (hidden.status_code, hidden.json()["error"]["param"]) == (404, "id")
    # The very same bytes and a public model: the other tenant's answer is not theirs.
    own = client.get(f"/v1/files/{theirs}/{kind}", params=params, headers=as_stranger)
    assert own.status_code == 503
    with world.database.write() as session:
        registry.get(session, model, org_id=ORG).public = False
    answer = client.get(f"/v1/files/{theirs}/{kind}", params=params, headers=as_stranger)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_deleted_file_takes_what_quotes_it_along(client, world, model):
    file_id, twin = world.file(), world.file()
    client.get(f"/v1/files/{file_id}/preview", params={"model": model, "wait": 0})
    answer_one(world, ROWS)
    client.delete(f"/v1/files/{file_id}")
    assert count(world, Preview) == 1
    client.delete(f"/v1/files/{twin}")
    assert count(world, Preview) == 0


def test_bytes_that_have_not_come_cannot_be_shown(client, world, model):
    with world.database.write() as session:
        file = files.start_import(session, org_id=ORG, source=HubSource("org/data"))
    answer = client.get(f"/v1/files/{file.id}/preview", params={"model": model})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "file_not_ready")


def test_a_model_that_is_imported_cannot_look_yet(client, world):
    file_id = world.file()
    with world.database.write() as session:
        registry.start_import(session, org_id=ORG, model_id="new", source="/source")
    answer = client.get(f"/v1/files/{file_id}/preview", params={"model": "new"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_ready")
