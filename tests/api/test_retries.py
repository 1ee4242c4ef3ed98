"""Jobs that are tried again: as a new one by their owner, or smaller by the service for want of memory."""

from typing import Any

import pytest
from sqlalchemy import select

from db import tasks
from db.models import Job
from db.work_models import Task
from tests.api.test_diagnosis import exit_of
from workers.ring import _start_job
from workers.train import describe_run, finish, run_dir_of

JOBS = "/v1/fine_tuning/jobs"
on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
HYPERPARAMETERS = {"n_epochs": 2, "batch_size": 8, "micro_batch_size": 4}


@pytest.fixture
def body(world) -> dict[str, Any]:
    return {
        "model": world.base_model(),
        "training_file": world.file(),
        "suffix": "v1",
        "seed": 11,
        "metadata": {"team": "x"},
        "priority": 3,
        "on_oom": "halve_batch",
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": HYPERPARAMETERS | {"ddp_timeout": 9}},
        },
    }


@pytest.fixture
def job(client, body) -> str:
    return create(client, body)


def create(client, body) -> str:
    answer = client.post(JOBS, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def begin(world) -> tasks.Lease:
    """Claim as a worker does, with the hyperparameters that it resolves."""
    world.skip_delays()
    lease = world.claim("train")
    with world.database.write() as session:
        assert _start_job(session, lease)
    return lease


def end(world, lease: tasks.Lease, reason: str) -> None:
    with tasks.fenced(world.database, lease) as session:
        finish(session, lease, exit_=exit_of(reason), draining=False)


def fail(world) -> None:
    end(world, begin(world), "nan_loss")


def retry(client, job: str, body: dict[str, Any] | None = None, **headers: str) -> dict[str, Any]:
    answer = client.post(f"{JOBS}/{job}/retry", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def messages(client, job: str) -> list[str]:
    told = client.get(f"{JOBS}/{job}/events", params={"limit": 99, "order": "asc"}).json()["data"]
    return [event["message"] for event in told]


@on_both
def test_a_failed_job_is_tried_again_as_a_new_one(client, world, job):
    fail(world)
    before = client.get(f"{JOBS}/{job}").json()
    again = retry(client, job)
    assert client.get(f"{JOBS}/{job}").json() == before  # a terminal status never changes
    assert (again["retry_of"], again["status"]) == (job, "queued")
    assert again["id"] != job
    kept = ("model", "training_file", "user_provided_suffix", "seed", "metadata", "priority", "on_oom")
    kept += ("resources", "ignored", "integrations", "organization_id")
    assert {name: again[name] for name in kept} == {name: before[name] for name in kept}
    asked = again["method"]["supervised"]["hyperparameters"]
    assert asked.items() >= HYPERPARAMETERS.items()
    assert messages(client, again["id"])[0] == (
        f"Created fine-tuning job: {again['id']}, which tries {job} again"
    )


@on_both
def test_only_what_did_not_succeed_is_tried_again(client, world, job):
    def refusal() -> str:
        answer = client.post(f"{JOBS}/{job}/retry")
        assert answer.status_code == 400
        return answer.json()["error"]["code"]

    assert refusal() == "job_not_retryable"
    client.post(f"{JOBS}/{job}/pause")
    assert refusal() == "job_not_retryable"
    client.post(f"{JOBS}/{job}/resume")
    lease = begin(world)
    assert refusal() == "job_not_retryable"
    world.finish(lease)
    assert refusal() == "job_not_retryable"


def test_a_cancelled_job_is_tried_again_and_others_cannot(client, job, as_stranger):
    client.post(f"{JOBS}/{job}/cancel")
    assert client.post(f"{JOBS}/{job}/retry", headers=as_stranger).status_code == 404
    assert retry(client, job)["retry_of"] == job


@on_both
def test_a_key_makes_one_retry(client, world, job):
    fail(world)
    first = retry(client, job, **{"Idempotency-Key": "k"})
    assert retry(client, job, **{"Idempotency-Key": "k"}) == first
    assert retry(client, job)["id"] != first["id"]
    answer = client.post(
        f"{JOBS}/{job}/retry", json={"hyperparameters": {"n_epochs": 1}}, headers={"Idempotency-Key": "k"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "idempotency_key_reused")


def test_hyperparameters_are_replaced_under_any_of_their_names(client, world, job):
    fail(world)
    changed = retry(client, job, {"hyperparameters": {"per_device_train_batch_size": 2, "fp16": True}})
    asked = changed["method"]["supervised"]["hyperparameters"]
    assert (asked["micro_batch_size"], asked["dtype"], asked["batch_size"]) == (2, "float16", 8)
    answer = client.post(f"{JOBS}/{job}/retry", json={"hyperparameters": {"n_epochs": 99}})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "method.supervised.hyperparameters.n_epochs")


def roots_of(world, lease: tasks.Lease) -> list[Any]:
    with world.database.read() as session:
        return describe_run(session, lease).resume_roots


@on_both
def test_an_unchanged_retry_goes_on_from_the_old_checkpoints(client, world, job, monkeypatch):
    monkeypatch.setenv("RESIDENCY_HOME", str(world.settings.home))
    first = begin(world)
    end(world, first, "error")
    second = begin(world)
    assert roots_of(world, second) == [run_dir_of(job, first.token) / "checkpoints"]
    end(world, second, "nan_loss")
    again = retry(client, job)["id"]
    own = begin(world)
    old = [run_dir_of(job, token) / "checkpoints" for token in (second.token, first.token)]
    assert roots_of(world, own) == old
    end(world, own, "nan_loss")
    third = retry(client, again)["id"]
    assert roots_of(world, begin(world)) == [run_dir_of(again, own.token) / "checkpoints", *old]
    client.post(f"{JOBS}/{third}/cancel")


def test_a_changed_retry_starts_anew(client, world, job, monkeypatch):
    monkeypatch.setenv("RESIDENCY_HOME", str(world.settings.home))
    fail(world)
    retry(client, job, {"hyperparameters": {"learning_rate": 1e-5}})
    assert roots_of(world, begin(world)) == []


@on_both
def test_too_little_memory_halves_the_pass_until_one_row_is_left(client, world, job):
    for attempt, micro in ((1, 4), (2, 2), (3, 1)):
        lease = begin(world)
        assert lease.token == attempt
        with world.database.read() as session:
            resolved = session.get_one(Job, job).resolved or {}
            charged = session.scalars(select(Task.charged).where(Task.subject_id == job)).one()
        assert (resolved["micro_batch_size"], resolved["batch_size"], charged) == (micro, 8, 1)
        end(world, lease, "cuda_oom" if micro > 2 else "cpu_oom")
    shown = client.get(f"{JOBS}/{job}").json()
    assert (shown["status"], shown["error"]["code"]) == ("failed", "out_of_memory")
    assert shown["hyperparameters"]["micro_batch_size"] == 1
    assert (
        "Too little memory for passes of 4 rows: it goes on with 2, and a batch stays 8 rows; "
        "the job waits for another attempt"
    ) in messages(client, job)


def test_without_the_wish_too_little_memory_is_the_end(client, world, body):
    job = create(client, body | {"on_oom": None})
    end(world, begin(world), "cuda_oom")
    assert client.get(f"{JOBS}/{job}").json()["status"] == "failed"


@pytest.mark.parametrize(("verb", "status"), [("pause", "paused"), ("cancel", "cancelled")])
def test_a_wish_counts_more_than_another_try(client, world, job, verb, status):
    lease = begin(world)
    client.post(f"{JOBS}/{job}/{verb}")
    end(world, lease, "cuda_oom")
    assert client.get(f"{JOBS}/{job}").json()["status"] == status


@pytest.mark.parametrize(
    ("more", "param"),
    [({"on_oom": "pray"}, "on_oom"), ({"priority": 11}, "priority"), ({"priority": "high"}, "priority")],
)
def test_what_cannot_be_wished_for(client, body, more, param):
    answer = client.post(JOBS, json=body | more)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
