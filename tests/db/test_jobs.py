"""The road of a job: every transition leaves an event, and only legal ones happen (G1, G7, G8)."""

from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from db import files, jobs, recovery, registry, tasks
from db.errors import Conflict, IllegalTransition, NotFound
from db.models import Job, Model
from db.states import JOB_STATES, JOB_TERMINAL, JOB_TRANSITIONS
from tests.db.world import ERROR, RESOLVED, World, claim


def test_the_whole_road(world: World):
    file = world.upload()
    job = world.add_job(file.id, suffix="ward", metadata={"unit": "icu"}, integrations=[])
    assert (job.status, job.phase, job.finished_at) == ("validating_files", None, None)

    world.check(file.id)
    assert world.job(job.id).status == "queued"
    lease = world.take()
    with tasks.fenced(world.database, lease) as session:
        running = jobs.get(session, job.id, org_id=world.org_id)
        jobs.set_phase(session, running, "training")
        jobs.set_progress(session, running, {"step": 1, "total_steps": 3})
    running = world.job(job.id)
    assert (running.status, running.phase) == ("running", "training")
    assert running.resolved == RESOLVED
    assert running.progress is not None
    assert running.progress.pop("updated_at") >= running.created_at
    assert running.progress == {"step": 1, "total_steps": 3}
    assert running.started_at is not None

    world.train(lease)
    merging = world.job(job.id)
    assert (merging.status, merging.phase, merging.trained_attempt) == ("running", "merging", lease.token)
    assert merging.trained_tokens == 5
    world.merge(world.take("cpu"))

    done = world.job(job.id)
    assert (done.status, done.phase, done.error) == ("succeeded", None, None)
    assert done.finished_at is not None
    assert world.history(job.id) == ["queued", "running", "succeeded"]
    assert [event.message for event in world.events(job.id)] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {file.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Training finished; merging the adapter into its base",
        f"New fine-tuned model created: {done.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert {world.task(job.id).status, world.task(job.id, "merge").status} == {"closed"}
    with world.database.read() as session:
        model = registry.get_ready(session, str(done.fine_tuned_model), org_id=world.org_id)
    assert (model.job_id, model.parent_id, model.root_id, model.public) == (job.id, "base", "base", False)
    assert model.id.startswith("ft:base:default:ward:")


def test_without_an_adapter_there_is_nothing_to_merge(world: World):
    job = world.add_job()
    with world.database.write() as session:
        lease = claim(session)
        assert lease is not None
        jobs.start(session, lease, resolved={"use_peft": False})
    world.train(lease)
    assert world.events(job.id)[-1].message == "Training finished; checking the model, trained as a whole"


def test_a_checked_file_queues_a_job_at_once(world: World):
    job = world.add_job(resources={"nproc_per_node": 2, "nnodes": 1})

    assert job.status == "queued"
    assert (world.task(job.id).status, world.task(job.id).devices_needed) == ("queued", 2)


def test_a_job_waits_for_both_files(world: World):
    training, validation = world.upload(), world.upload()
    job = world.add_job(training.id, validation_file=validation.id)
    assert f"Validating training file: {training.id} and validation file: {validation.id}" in [
        event.message for event in world.events(job.id)
    ]

    world.check(training.id)
    assert world.job(job.id).status == "validating_files"
    world.check(validation.id)
    assert world.job(job.id).status == "queued"


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_bad_file_fails_the_job_that_waits_for_it(world: World, param: str):
    chosen = {"training_file": world.upload().id, "validation_file": world.upload().id}
    job = world.add_job(**chosen)

    world.check(chosen[param], error="Line 3: no assistant message")

    failed = world.job(job.id)
    assert failed.status == "failed"
    assert failed.error == {
        "code": f"invalid_{param}",
        "message": "Line 3: no assistant message",
        "param": param,
    }
    last = world.events(job.id)[-1]
    assert (last.level, last.message) == ("error", "Job failed: Line 3: no assistant message")
    other = "validation_file" if param == "training_file" else "training_file"
    world.check(chosen[other])
    assert world.history(job.id) == ["failed"]


def test_a_check_touches_only_the_jobs_of_its_file(world: World):
    bad, good = world.upload(), world.upload()
    doomed, waiting, queued = world.add_job(bad.id), world.add_job(good.id), world.add_job()

    world.check(bad.id, error="Line 1: not JSON")

    assert [world.job(job.id).status for job in (doomed, waiting, queued)] == [
        "failed",
        "validating_files",
        "queued",
    ]


def test_jobs_that_waited_for_one_file_are_queued_oldest_first(world: World):
    file = world.upload()
    made = [world.add_job(file.id).id for _ in range(6)]

    world.check(file.id)

    tasks_ = sorted((world.task(job_id) for job_id in made), key=lambda task: (task.created_at, task.id))
    assert [task.subject_id for task in tasks_] == made


def test_a_check_that_dies_on_every_attempt_fails_the_waiting_job(world: World):
    job = world.add_job(world.upload().id)

    for _ in range(3):
        world.expire(world.take("cpu"))
        assert recovery.reap(world.database, ttl_s=0) == 1

    failed = world.job(job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "invalid_training_file"
    with world.database.read() as session:
        assert files.get(session, job.training_file, org_id=world.org_id).status == "error"


def test_what_a_job_names_must_exist_and_fit(world: World):
    checked = world.add_file()
    invalid = world.upload()
    world.check(invalid.id, error="Line 2: not JSON")
    text_file = world.upload(purpose="batch")
    world.add_model("half", status="importing", path=None, digest=None)

    def refused(**changes: Any) -> tuple[str, str | None]:
        with pytest.raises((Conflict, NotFound)) as caught:
            world.add_job(**({"training_file": checked} | changes))
        error = caught.value
        return (error.code, error.param) if isinstance(error, Conflict) else (error.kind, error.subject_id)

    assert refused(model="nothing") == ("model", "nothing")
    assert refused(model="half") == ("model_not_ready", "model")
    assert refused(training_file="file-none") == ("file", "file-none")
    assert refused(validation_file="file-none") == ("file", "file-none")
    assert refused(training_file=invalid.id) == ("invalid_training_file", "training_file")
    assert refused(validation_file=invalid.id) == ("invalid_validation_file", "validation_file")
    assert refused(training_file=text_file.id) == ("invalid_file_purpose", "training_file")
    with world.database.read() as session:
        assert list(session.scalars(select(Job))) == []


def test_an_interrupted_job_goes_on_in_another_attempt(world: World):
    job = world.add_job()
    world.give_back(world.take())
    with world.database.write() as session:
        assert claim(session) is None, "it rests before the next attempt"
    started_at = world.job(job.id).started_at
    world.skip_delays()

    lease = world.take()

    assert lease.token == 2
    assert world.job(job.id).started_at == started_at
    assert world.history(job.id) == ["queued", "running", "queued", "running"]
    assert [event.message for event in world.events(job.id)][-2:] == [
        "The trainer was killed; the job waits for another attempt",
        "Fine-tuning job goes on (attempt 2)",
    ]


@pytest.mark.parametrize("how", ["given back", "reaped", "abandoned"])
def test_a_job_without_attempts_left_fails(world: World, how: str):
    job = world.add_job()

    for _ in range(3):
        world.skip_delays()
        lease = world.take(devices=[f"slot:{number}" for number in range(9)])
        if how == "given back":
            world.give_back(lease)
        elif how == "abandoned":
            assert recovery.abandon(world.database, lease.attempt_id)
        else:
            world.expire(lease)
            assert recovery.reap(world.database, ttl_s=0) == 1

    failed = world.job(job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "too_many_attempts"
    assert world.task(job.id).status == "closed"
    outcome = "failed" if how == "given back" else "lost"
    assert [attempt.outcome for attempt in world.attempts(job.id)] == [outcome] * 3
    assert world.history(job.id) == ["queued", *["running", "queued"] * 2, "running", "failed"]


def test_an_interruption_of_our_own_making_is_not_charged(world: World):
    job = world.add_job()

    for _ in range(5):
        world.give_back(world.take(), charge=False)

    assert world.job(job.id).status == "queued"
    assert world.task(job.id).charged == 0
    assert {attempt.outcome for attempt in world.attempts(job.id)} == {"stopped"}


def test_a_lost_merge_is_tried_again_and_the_job_keeps_running(world: World):
    job, lease = world.to_merging()

    for token in (1, 2):
        assert lease.token == token
        world.expire(lease)
        recovery.reap(world.database, ttl_s=0)
        assert (world.job(job.id).status, world.job(job.id).phase) == ("running", "merging")
        lease = world.take("cpu")
    world.give_back(lease)

    assert world.history(job.id) == ["queued", "running", "failed"]
    assert world.task(job.id, "merge").status == "closed"


def test_a_worker_may_die_between_its_claim_and_the_start_of_the_job(world: World):
    job = world.add_job()
    with world.database.write() as session:
        lease = claim(session)
    assert lease is not None

    assert recovery.abandon(world.database, lease.attempt_id)

    assert (world.job(job.id).status, world.task(job.id).status) == ("queued", "queued")


def test_a_failed_job_tells_why(world: World):
    job = world.add_job()
    lease = world.take()

    with tasks.fenced(world.database, lease) as session:
        jobs.fail(session, lease, error=ERROR, exit_={"reason": "nan_loss"})

    failed = world.job(job.id)
    assert (failed.status, failed.error) == ("failed", ERROR)
    last = world.events(job.id)[-1]
    assert (last.level, last.data) == ("error", {"status": "failed", "error": ERROR})
    (attempt,) = world.attempts(job.id)
    assert (attempt.outcome, attempt.exit) == ("failed", {"reason": "nan_loss"})


@pytest.mark.parametrize("state", JOB_STATES)
def test_only_legal_transitions(world: World, state: str):
    """Each state against each, through the functions that lead there."""
    job = world.add_job()
    lease = world.take()
    values: dict[str, Any] = {"status": state, "finished_at": 1.0 if state in JOB_TERMINAL else None}
    values |= {"error": ERROR if state == "failed" else None}
    values |= {"fine_tuned_model": "ft:x" if state == "succeeded" else None}
    world.run(update(Job).where(Job.id == job.id).values(**values))
    before = world.job(job.id).status, world.history(job.id)
    calls = {
        "running": lambda session: jobs.start(session, lease, resolved={}),
        "failed": lambda session: jobs.fail(session, lease, error=ERROR),
        "cancelled": lambda session: jobs.cancel(session, lease),
        "succeeded": lambda session: jobs.finish_merge(
            session, lease, path=world.home, adapter_path=world.home, report={"digest": "e"}
        ),
    }

    for following, call in calls.items():
        if following in JOB_TRANSITIONS[state]:
            continue
        with pytest.raises(IllegalTransition), tasks.fenced(world.database, lease) as session:
            call(session)

    assert (world.job(job.id).status, world.history(job.id)) == before
    assert world.task(job.id).status == "leased"
    with world.database.read() as session:
        assert list(session.scalars(select(Model.id).where(Model.kind == "merged"))) == []


@pytest.mark.parametrize(
    "values",
    [
        {"status": "lost"},
        {"phase": "thinking"},
        {"status": "cancelled"},
        {"finished_at": 1.0},
        {"status": "succeeded", "finished_at": 1.0},
        {"status": "failed", "finished_at": 1.0},
        {"error": ERROR},
    ],
    ids=lambda values: "+".join(values),
)
def test_the_database_itself_refuses_impossible_jobs(world: World, values: dict[str, Any]):
    job = world.add_job()

    with pytest.raises(IntegrityError):
        world.run(update(Job).where(Job.id == job.id).values(**values))
