"""Cancels in every state, and what may happen at the same moment: one end, one terminal event (G6, G7)."""

from collections.abc import Callable

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from db import events, jobs, recovery, registry, tasks
from db.errors import Conflict, IllegalTransition, LeaseLost, NotFound
from db.models import File, Job
from db.states import JOB_TERMINAL
from db.tasks import Lease
from db.work_models import Task
from tests.db.world import ERROR, RESOLVED, World, claim, race, record_check, run_against_open

ROUNDS = 12


def fenced(world: World, lease: Lease, write: Callable[[Session, Lease], object]) -> None:
    with tasks.fenced(world.database, lease) as session:
        write(session, lease)


def assert_over(world: World, job_id: str) -> str:
    """The job has ended once and left nothing behind; its state."""
    job = world.job(job_id)
    assert job.status in JOB_TERMINAL
    history = world.history(job_id)
    assert history[-1] == job.status
    assert sum(state in JOB_TERMINAL for state in history) == 1
    with world.database.read() as session:
        states = list(session.scalars(select(Task.status).where(Task.subject_id == job_id)))
    assert set(states) <= {"closed"}
    for attempt in world.attempts(job_id):
        assert attempt.ended_at is not None
    return job.status


@pytest.mark.parametrize("state", ["validating_files", "queued", "given back", "waiting for its merge"])
def test_a_job_nobody_works_on_is_cancelled_at_once(world: World, state: str):
    job = world.add_job(world.upload().id if state == "validating_files" else None)
    if state == "given back":
        world.give_back(world.take())
    elif state == "waiting for its merge":
        world.train(world.take())

    assert world.cancel(job.id).status == "cancelled"

    assert_over(world, job.id)
    world.skip_delays()
    assert world.claim() is None
    if state != "validating_files":
        assert world.claim("cpu") is None


@pytest.mark.parametrize("kind", ["train", "merge"])
def test_the_owner_is_told_and_ends_the_job(world: World, kind: str):
    if kind == "train":
        job = world.add_job()
        lease = world.take()
    else:
        job, lease = world.to_merging()

    assert world.cancel(job.id).status == "running"
    world.cancel(job.id)  # asking twice changes nothing

    with tasks.fenced(world.database, lease) as session:
        assert jobs.stop_asked(session, job.id) == "cancel"
    asked = [event for event in world.events(job.id) if event.message == "Cancellation requested"]
    assert len(asked) == 1
    fenced(world, lease, jobs.cancel)
    assert assert_over(world, job.id) == "cancelled"


@pytest.mark.parametrize("charge", [True, False])
@pytest.mark.parametrize("kind", ["train", "merge"])
def test_an_interruption_after_a_cancel_ends_the_job(world: World, kind: str, charge: bool):
    if kind == "train":
        job = world.add_job()
        lease = world.take()
    else:
        job, lease = world.to_merging()
    world.cancel(job.id)

    world.give_back(lease, charge=charge)

    assert assert_over(world, job.id) == "cancelled"


def test_a_lost_worker_after_a_cancel_ends_the_job(world: World):
    job = world.add_job()
    lease = world.take()
    world.cancel(job.id)
    world.expire(lease)

    assert recovery.reap(world.database, ttl_s=0) == 1

    assert assert_over(world, job.id) == "cancelled"


def test_what_is_over_cannot_be_cancelled(world: World):
    cancelled = world.add_job()
    world.cancel(cancelled.id)
    failed = world.add_job()
    fenced(world, world.take(), lambda session, lease: jobs.fail(session, lease, error=ERROR))
    succeeded, lease = world.to_merging()
    world.merge(lease)

    for job in (cancelled, failed, succeeded):
        before = world.history(job.id)
        with pytest.raises(Conflict) as caught:
            world.cancel(job.id)
        assert caught.value.code == "job_not_cancellable"
        assert world.history(job.id) == before


def test_a_job_of_nobody_cannot_be_cancelled(world: World):
    job = world.add_job()

    for asking, job_id in ((world, "ftjob-none"), (world.other("clinic"), job.id)):
        with pytest.raises(NotFound):
            asking.cancel(job_id)

    assert world.job(job.id).status == world.task(job.id).status == "queued"


def test_a_job_created_while_its_file_is_checked_does_not_wait_for_ever(world: World):
    for turn in range(ROUNDS):
        file = world.upload()
        error = "Line 1: not JSON" if turn % 3 == 0 else None

        created, checked = race(
            lambda file=file: world.add_job(file.id),
            lambda file=file, error=error: world.check(file.id, error=error),
        )

        assert checked is None
        if isinstance(created, Job):
            assert world.job(created.id).status == ("failed" if error else "queued")
        else:
            assert isinstance(created, Conflict)


@pytest.mark.parametrize("error", [None, "Line 1: not JSON"])
def test_a_job_created_before_the_commit_of_a_check(world: World, error: str | None):
    file = world.upload()

    _, created = run_against_open(
        world.database,
        lambda session: record_check(session, file.id, error=error),
        lambda: world.add_job(file.id),
    )

    if error:
        assert isinstance(created, Conflict)
    else:
        assert (created.status, world.task(created.id).status) == ("queued", "queued")


def test_a_check_that_ends_before_the_commit_of_a_job(world: World):
    file = world.upload()

    job, checked = run_against_open(
        world.database,
        lambda session: jobs.create(session, world.new_job(file.id), org_id=world.org_id),
        lambda: world.check(file.id),
    )

    assert checked is None
    assert world.job(job.id).status == "queued"


def test_both_files_of_a_job_checked_at_the_same_time(world: World):
    for _ in range(ROUNDS):
        training, validation = world.upload(), world.upload()
        waiting = [world.add_job(training.id, validation_file=validation.id) for _ in range(2)]

        outcomes = race(
            lambda file=training: world.check(file.id), lambda file=validation: world.check(file.id)
        )

        assert outcomes == [None, None]
        assert [world.job(job.id).status for job in waiting] == ["queued", "queued"]


def test_a_cancel_while_the_check_queues_the_job(world: World):
    file = world.upload()
    job = world.add_job(file.id)

    _, cancelled = run_against_open(
        world.database, lambda session: record_check(session, file.id), lambda: world.cancel(job.id)
    )

    assert cancelled.status == "cancelled"
    assert assert_over(world, job.id) == "cancelled"


def test_a_cancel_while_a_worker_claims(world: World):
    for _ in range(ROUNDS):
        job = world.add_job()

        lease, cancelled = race(world.claim, lambda job=job: world.cancel(job.id))

        assert isinstance(cancelled, Job)
        if lease is None:
            assert cancelled.status == "cancelled"
        else:
            assert world.job(job.id).cancel_requested_at is not None
            fenced(world, lease, jobs.cancel)
        assert assert_over(world, job.id) == "cancelled"


def test_a_cancel_while_the_merge_ends(world: World):
    ends = set()
    for _ in range(ROUNDS):
        job, lease = world.to_merging()

        merged, cancelled = race(lambda lease=lease: world.merge(lease), lambda job=job: world.cancel(job.id))

        assert isinstance(merged, Job)
        assert isinstance(cancelled, Job) or cancelled.code == "job_not_cancellable"
        ends.add(assert_over(world, job.id))
    assert ends == {"succeeded"}


def test_a_cancel_while_the_training_ends(world: World):
    for _ in range(ROUNDS):
        job = world.add_job()
        lease = world.take()

        trained, cancelled = race(
            lambda lease=lease: world.train(lease), lambda job=job: world.cancel(job.id)
        )

        assert trained is None
        assert isinstance(cancelled, Job)
        merge = world.claim("cpu")
        if merge is not None:  # the cancel came first: the merge's owner is told
            assert world.job(job.id).cancel_requested_at is not None
            fenced(world, merge, jobs.cancel)
        assert assert_over(world, job.id) == "cancelled"


def test_a_cancel_while_the_worker_gives_back(world: World):
    for _ in range(ROUNDS):
        job = world.add_job()
        lease = world.take()

        returned, cancelled = race(
            lambda lease=lease: world.give_back(lease), lambda job=job: world.cancel(job.id)
        )

        assert returned is None
        assert isinstance(cancelled, Job)
        assert assert_over(world, job.id) == "cancelled"


def test_a_cancel_seen_only_by_the_finishing_transaction(world: World):
    """The finishing transaction has read the job before the cancel came and must look again."""
    job = world.add_job()
    lease = world.take()

    def give_back() -> None:
        with tasks.fenced(world.database, lease) as session:
            seen = jobs.get(session, job.id, org_id=world.org_id)
            jobs.give_back(session, lease, exit_=None, charge=False, why="The worker shuts down")
            assert seen.status == "cancelled"

    def ask(session: Session) -> None:
        found = session.scalars(select(Job).where(Job.id == job.id).with_for_update()).one()
        found.cancel_requested_at = 1.0
        session.flush()

    _, returned = run_against_open(world.database, ask, give_back)

    assert returned is None
    assert assert_over(world, job.id) == "cancelled"


def test_all_cancels_of_a_moment_leave_one_event(world: World):
    job = world.add_job()

    outcomes = race(*[lambda: world.cancel(job.id)] * 6)

    assert sum(isinstance(outcome, Job) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 5
    assert assert_over(world, job.id) == "cancelled"


def test_only_one_of_two_ends_is_written(world: World):
    for _ in range(ROUNDS):
        job = world.add_job()
        lease = world.take()
        world.expire(lease)

        outcomes = race(
            lambda lease=lease: fenced(
                world, lease, lambda session, lease: jobs.fail(session, lease, error=ERROR)
            ),
            lambda: recovery.reap(world.database, ttl_s=0),
        )

        assert outcomes[1] in (0, 1)
        if outcomes[1]:
            assert isinstance(outcomes[0], LeaseLost)
            assert world.history(job.id) == ["queued", "running", "queued"]
            world.cancel(job.id)
        else:
            assert outcomes[0] is None
            assert assert_over(world, job.id) == "failed"
        with world.database.write() as session:
            tasks.release_devices(session, lease.attempt_id)


def test_a_model_deleted_under_a_new_job_wins_or_loses_whole(world: World):
    for turn in range(ROUNDS):
        model = world.add_model(f"mine-{turn}", kind="merged", public=False)
        file_id = world.add_file()

        created, deleted = race(
            lambda model=model, file_id=file_id: world.add_job(file_id, model=model.id),
            lambda model=model: registry.delete(world.database, model.id, org_id=world.org_id),
        )

        if isinstance(created, Job):
            assert isinstance(deleted, Conflict)
        else:
            assert (type(created), deleted) == (NotFound, None)


def test_a_job_is_not_accepted_on_a_model_that_is_being_deleted(world: World):
    model = world.add_model("mine", kind="merged", public=False)
    file_id = world.add_file()

    def remove(session: Session) -> None:
        found = registry.get(session, "mine", org_id=world.org_id)
        session.refresh(found, with_for_update=True)
        found.deleted_at = 1.0
        session.flush()

    _, created = run_against_open(world.database, remove, lambda: world.add_job(file_id, model=model.id))

    assert isinstance(created, NotFound)


def test_a_file_deleted_while_it_is_checked(world: World):
    file = world.upload()

    def remove(session: Session) -> None:
        session.delete(session.get_one(File, file.id, with_for_update=True))
        session.flush()

    _, checked = run_against_open(world.database, remove, lambda: world.check(file.id))

    assert checked is None


def test_events_of_a_job_are_numbered_in_the_order_of_their_commits(world: World):
    """Whoever polls for what follows the last event seen misses none."""
    job = world.add_job()
    lease = world.take()

    def beat() -> None:
        with tasks.fenced(world.database, lease) as session:
            events.add(session, job, "Step 1/3", type_="metrics")

    run_against_open(
        world.database,
        lambda session: session.get_one(Job, job.id, with_for_update=True),
        beat,
        then=lambda session: jobs.request_cancel(session, job.id, org_id=world.org_id),
    )

    assert [event.message for event in world.events(job.id)][-2:] == ["Cancellation requested", "Step 1/3"]


def test_a_job_that_started_already_is_not_started_again(world: World):
    world.add_job()
    lease = world.take()

    with pytest.raises(IllegalTransition), tasks.fenced(world.database, lease) as session:
        jobs.start(session, lease, resolved={"n_epochs": 9})

    assert world.job(lease.subject_id).resolved == RESOLVED
    with world.database.write() as session:
        assert claim(session) is None
