"""One answer for one Idempotency-Key, however often and however concurrently it is asked."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import func, select

from db.models import Event, Job, Task

JOBS = "/v1/fine_tuning/jobs"
on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def body(world) -> dict:
    return {"model": world.base_model(), "training_file": world.file()}


def count(world, table) -> int:
    with world.database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


@on_both
def test_fifty_at_once_make_one_job(server, world, body):
    headers = {"authorization": f"Bearer {world.user}", "idempotency-key": "one"}
    with httpx.Client(base_url=server, headers=headers, timeout=30, trust_env=False) as client:

        def submit(_: int) -> httpx.Response:
            return client.post(JOBS, json=body)

        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(submit, range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert count(world, Job) == 1
    assert count(world, Event) == 3
    with world.database.read() as session:
        assert len(session.scalars(select(Task).where(Task.kind == "train")).all()) == 1


def test_replay_and_misuse(client, body):
    headers = {"idempotency-key": "k"}
    first = client.post(JOBS, json=body, headers=headers)
    assert "idempotency-replayed" not in first.headers
    # the same request written differently
    again = client.post(JOBS, json=dict(reversed(body.items())), headers=headers)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json() == first.json()
    other = client.post(JOBS, json=body | {"seed": 1}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"


def test_replay_is_the_first_answer_even_after_the_end(client, body):
    headers = {"idempotency-key": "k"}
    first = client.post(JOBS, json=body, headers=headers).json()
    client.post(f"{JOBS}/{first['id']}/cancel")
    assert client.post(JOBS, json=body, headers=headers).json() == first


def test_a_refusal_is_not_remembered(client, world, body):
    headers = {"idempotency-key": "k"}
    assert client.post(JOBS, json=body | {"model": "later"}, headers=headers).status_code == 404
    world.base_model("later")
    assert client.post(JOBS, json=body | {"model": "later"}, headers=headers).status_code == 200


def test_keys_of_tenants_do_not_meet(client, world, body, as_stranger):
    headers = {"idempotency-key": "k"}
    mine = client.post(JOBS, json=body, headers=headers).json()
    theirs = client.post(
        JOBS,
        json=body | {"training_file": world.file(org_id="org-other")},
        headers=headers | as_stranger,
    )
    assert theirs.status_code == 200
    assert theirs.json()["id"] != mine["id"]


def test_without_a_key_every_request_is_a_job(client, world, body):
    assert client.post(JOBS, json=body).json()["id"] != client.post(JOBS, json=body).json()["id"]
    assert count(world, Job) == 2


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_impossible_keys(client, body, key):
    answer = client.post(JOBS, json=body, headers={"idempotency-key": key})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")
