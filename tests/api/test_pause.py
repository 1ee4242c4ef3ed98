"""Pause and resume, as a client asks for them and a worker carries them out."""

import pytest
from sqlalchemy import select

from db import jobs, recovery, tasks
from db.work_models import Task
from workers.train import finish

JOBS = "/v1/fine_tuning/jobs"
on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def job(client, world) -> str:
    body = {"model": world.base_model(), "training_file": world.file()}
    return client.post(JOBS, json=body).json()["id"]


def ask(client, job: str, verb: str) -> str:
    """The status that the service answers, or the code of its refusal."""
    answer = client.post(f"{JOBS}/{job}/{verb}", headers={"content-type": "application/json"})
    if answer.status_code == 200:
        return answer.json()["status"]
    assert answer.status_code == 400
    assert answer.headers["x-should-retry"] == "false"
    return answer.json()["error"]["code"]


def status(client, job: str) -> str:
    return client.get(f"{JOBS}/{job}").json()["status"]


def charged(world, job: str) -> int:
    with world.database.read() as session:
        return session.scalars(select(Task.charged).where(Task.subject_id == job, Task.kind == "train")).one()


@on_both
def test_a_waiting_job(client, world, job):
    assert ask(client, job, "pause") == "paused"
    assert ask(client, job, "pause") == "paused"  # an answer that was lost may be asked for again
    with world.database.read() as session:
        assert not tasks.waiting(session, "train")
    assert client.get(JOBS, params={"status": "paused"}).json()["data"][0]["id"] == job
    assert ask(client, job, "resume") == "queued"
    assert ask(client, job, "resume") == "job_not_resumable"
    world.finish(world.start(job))
    assert status(client, job) == "succeeded"
    told = [event["message"] for event in client.get(f"{JOBS}/{job}/events").json()["data"]][::-1]
    assert told[3:5] == ["Fine-tuning job paused", "Fine-tuning job resumed, moving job to queued state"]


@on_both
def test_a_running_job_is_paused_by_its_worker_and_not_charged(client, world, job):
    for _ in range(4):  # more often than there are attempts
        lease = world.start(job)
        assert ask(client, job, "pause") == "running"
        assert ask(client, job, "pause") == "running"
        with world.database.write() as session:
            assert jobs.stop_asked(session, job) == "pause"
        with tasks.fenced(world.database, lease) as session:
            finish(session, lease, exit_={"reason": "stopped", "message": "asked to stop"}, draining=False)
        assert status(client, job) == "paused"
        assert charged(world, job) == 0
        assert ask(client, job, "resume") == "queued"
    asked = [
        event["message"] for event in client.get(f"{JOBS}/{job}/events", params={"limit": 99}).json()["data"]
    ]
    assert asked.count("Pause requested") == 4


def test_a_pause_that_comes_too_late_changes_nothing(client, world, job):
    lease = world.start(job)
    ask(client, job, "pause")
    world.finish(lease)
    assert status(client, job) == "succeeded"


def test_a_worker_that_dies_instead_leaves_the_job_paused(client, world, job):
    lease = world.start(job)
    ask(client, job, "pause")
    assert recovery.abandon(world.database, lease.attempt_id)
    assert status(client, job) == "paused"
    assert charged(world, job) == 1
    with world.database.read() as session:
        assert not tasks.waiting(session, "train")


def test_a_fault_of_the_job_wins_over_a_pause(client, world, job):
    lease = world.start(job)
    ask(client, job, "pause")
    with tasks.fenced(world.database, lease) as session:
        finish(session, lease, exit_={"reason": "nan_loss", "message": "not a number"}, draining=False)
    assert status(client, job) == "failed"


def test_a_cancel_wins_over_a_pause(client, world, job):
    lease = world.start(job)
    ask(client, job, "pause")
    assert ask(client, job, "cancel") == "running"
    with tasks.fenced(world.database, lease) as session:
        finish(session, lease, exit_=None, draining=False)
    assert status(client, job) == "cancelled"


def test_a_paused_job_can_be_cancelled(client, job):
    ask(client, job, "pause")
    assert ask(client, job, "cancel") == "cancelled"
    assert ask(client, job, "resume") == "job_not_resumable"


def test_what_cannot_be_paused(client, world, job):
    unchecked = world.file(checked=False)
    waiting = client.post(JOBS, json={"model": "org/base", "training_file": unchecked}).json()["id"]
    assert ask(client, waiting, "pause") == "job_not_pausable"
    lease = world.start(job)
    with tasks.fenced(world.database, lease) as session:
        jobs.finish_training(session, lease, exit_={})
    assert ask(client, job, "pause") == "job_not_pausable"
    assert ask(client, job, "resume") == "job_not_resumable"
    ask(client, waiting, "cancel")
    assert ask(client, waiting, "pause") == "job_not_pausable"
    for verb in ("pause", "resume"):
        assert client.post(f"{JOBS}/ftjob-unknown/{verb}").status_code == 404
