"""One answer for one Idempotency-Key, however often and however concurrently it is asked."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import func, select, update

from db.models import Event, File, IdempotentRequest, Job, Model
from db.work_models import Task

JOBS = "/v1/fine_tuning/jobs"
pytestmark = pytest.mark.faults(g=14, everyday=True)
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


# The official clients send no key; what they send again carries the number of the try.
AGAIN = {"x-stainless-retry-count": "1"}


@on_both
def test_a_blind_retry_gets_the_job_that_its_first_try_made(client, world, body):
    first = client.post(JOBS, json=body, headers={"x-stainless-retry-count": "0"})
    again = client.post(JOBS, json=body, headers=AGAIN)
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert count(world, Job) == 1


def test_a_retry_whose_first_try_never_arrived_makes_the_job(client, world, body):
    assert client.post(JOBS, json=body, headers=AGAIN).status_code == 200
    assert count(world, Job) == 1


def test_a_retry_repeats_the_newest_of_equal_requests(client, body):
    for _ in range(2):
        newest = client.post(JOBS, json=body).json()["id"]
    assert client.post(JOBS, json=body, headers=AGAIN).json()["id"] == newest


def test_other_bodies_keys_and_times_are_other_jobs(client, world, body, as_admin):
    client.post(JOBS, json=body)
    client.post(JOBS, json=body | {"seed": 1}, headers=AGAIN)
    client.post(JOBS, json=body, headers=AGAIN | as_admin)
    assert count(world, Job) == 3
    with world.database.write() as session:
        session.execute(update(IdempotentRequest).values(created_at=IdempotentRequest.created_at - 601))
    client.post(JOBS, json=body, headers=AGAIN)
    assert count(world, Job) == 4


@on_both
def test_a_retry_beside_its_first_try_waits_for_it(server, world, body):
    """The client gave up waiting, the server did not."""
    headers = {"authorization": f"Bearer {world.user}"}
    with httpx.Client(base_url=server, headers=headers, timeout=30, trust_env=False) as client:
        client.post(JOBS, json=body)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.post(JOBS, json=body, headers=AGAIN), range(8)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert count(world, Job) == 1


@pytest.mark.parametrize("headers", [{"idempotency-key": "k"}, AGAIN])
def test_an_upload_sent_again_is_one_file(client, world, headers):
    for _ in range(2):
        answer = client.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", b"{}")}, headers=headers
        )
        assert answer.status_code == 200
    assert answer.headers["idempotency-replayed"] == "true"
    assert count(world, File) == 1
    other = client.post(
        "/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", b"[]")}, headers=headers
    )
    assert other.status_code == (400 if "idempotency-key" in headers else 200)


@pytest.mark.parametrize("headers", [{"idempotency-key": "k"}, AGAIN])
def test_an_import_sent_again_is_one_model(client, world, as_admin, headers):
    body = {"id": "org/new", "source": "/models/new"}
    first = client.post("/v1/models/import", json=body, headers=as_admin | headers)
    again = client.post("/v1/models/import", json=body, headers=as_admin | headers)
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert count(world, Model) == 1
    taken = client.post("/v1/models/import", json=body, headers=as_admin)
    assert (taken.status_code, taken.json()["error"]["code"]) == (400, "model_exists")
