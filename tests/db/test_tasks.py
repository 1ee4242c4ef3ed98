"""Claims are exclusive, tokens fence, leases expire, devices are never held twice (G2, G8, G9)."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db import recovery, tasks
from db.errors import LeaseLost
from db.session import Database, clock
from db.tasks import Lease
from db.work_models import Attempt, DeviceLease, Task
from tests.db.world import World, claim, race, run_against_open

CLAIMERS = 8


def enqueue(world: World, *subjects: str, **values: int) -> list[Task]:
    with world.database.write() as session:
        return [
            tasks.enqueue(session, kind="train", subject_id=subject, org_id=world.org_id, **values)
            for subject in subjects
        ]


def take(world: World, **changes: Any) -> Lease:
    with world.database.write() as session:
        lease = claim(session, **changes)
        assert lease is not None
        return lease


def row(world: World, model: type, key: int) -> dict[str, object]:
    """All columns of a stored row."""
    with world.database.read() as session:
        found = session.get_one(model, key)
        return {column.key: getattr(found, column.key) for column in found.__table__.columns}


def test_concurrent_claimers_never_share_a_task(world: World):
    with world.database.write() as session:
        for number in range(200):
            tasks.enqueue(session, kind="validate", subject_id=f"file-{number}", org_id=world.org_id)
    claimed: list[Lease] = []

    def work() -> None:
        while True:
            with world.database.write() as session:
                lease = claim(session, "cpu", devices=[])
            if lease is None:
                return
            claimed.append(lease)
            with tasks.fenced(world.database, lease) as session:
                if lease.token == 1:  # every task is claimed twice
                    tasks.requeue(session, lease, outcome="stopped", charge=False)
                else:
                    tasks.finish(session, lease, outcome="done")

    outcomes = race(*[work] * CLAIMERS)

    assert outcomes == [None] * CLAIMERS
    claims = Counter((lease.task_id, lease.token) for lease in claimed)
    assert len(claims) == 400
    assert set(claims.values()) == {1}
    with world.database.read() as session:
        attempts = list(session.scalars(select(Attempt).order_by(Attempt.task_id, Attempt.started_at)))
        assert set(session.scalars(select(Task.status))) == {"closed"}
    for first, second in zip(attempts[::2], attempts[1::2], strict=True):
        assert (first.task_id, first.token, second.token) == (second.task_id, 1, 2)
        assert first.ended_at is not None
        assert first.ended_at <= second.started_at


def test_concurrent_claimers_never_share_a_device(world: World):
    with world.database.write() as session:
        for number in range(60):
            needed = 1 + number % 2
            tasks.enqueue(
                session,
                kind="train",
                subject_id=f"job-{number}",
                org_id=world.org_id,
                devices_needed=needed,
            )
    held: set[str] = set()
    guard = threading.Lock()
    done = []

    def work() -> None:
        while len(done) < 60:
            with world.database.write() as session:
                lease = claim(session, shared_slot=False)
            if lease is None:
                continue
            with guard:
                assert held.isdisjoint(lease.devices)
                held.update(lease.devices)
            with tasks.fenced(world.database, lease) as session:
                tasks.finish(session, lease, outcome="done")
                with guard:  # from the commit on another owner may have them
                    held.difference_update(lease.devices)
            done.append(lease)

    outcomes = race(*[work] * CLAIMERS)

    assert outcomes == [None] * CLAIMERS
    assert Counter(len(lease.devices) for lease in done) == {1: 30, 2: 30}
    with world.database.read() as session:
        history = list(session.scalars(select(DeviceLease)))
    assert len(history) == 90
    assert all(lease.released_at is not None for lease in history)


def test_the_database_itself_refuses_a_second_lease_of_a_device(world: World):
    enqueue(world, "job-1", devices_needed=1)
    lease = take(world)
    taken = {"node": "node-1", "device": lease.devices[0], "attempt_id": lease.attempt_id, "leased_at": 1.0}

    with pytest.raises(IntegrityError):
        world.run(insert(DeviceLease).values(**taken))


def test_a_claimer_whose_device_was_just_taken_takes_another(world: World):
    enqueue(world, "job-1", "job-2", devices_needed=1)

    def first(session: Session) -> Lease | None:
        return claim(session)

    def second() -> Lease | None:
        with world.database.write() as session:
            return claim(session)

    one, two = run_against_open(world.database, first, second)

    assert {one.devices, two.devices} == {("slot:0",), ("slot:1",)}
    assert {one.subject_id, two.subject_id} == {"job-1", "job-2"}


def test_priority_comes_first_then_age(world: World):
    enqueue(world, "old")
    enqueue(world, "young")
    enqueue(world, "urgent", priority=1)

    assert [take(world).subject_id for _ in range(3)] == ["urgent", "old", "young"]


def test_equal_ages_are_served_in_order_of_arrival(world: World):
    enqueue(world, "a", "b", "c")
    world.run(update(Task).values(created_at=1.0))

    assert [take(world).subject_id for _ in range(3)] == ["a", "b", "c"]


def test_a_task_waits_for_its_time_and_its_queue(world: World):
    (task,) = enqueue(world, "job-1")
    world.run(update(Task).values(not_before=Task.not_before + 3600))

    with world.database.write() as session:
        assert not tasks.waiting(session, "train")
        assert claim(session) is None
    world.skip_delays()
    with world.database.write() as session:
        assert tasks.waiting(session, "train")
        assert not tasks.waiting(session, "cpu")
        assert claim(session, "cpu") is None
        lease = claim(session)
    assert lease is not None
    assert lease.task_id == task.id


def test_tasks_that_do_not_fit_let_a_smaller_one_pass(world: World):
    enqueue(world, *[f"large-{number}" for number in range(150)], devices_needed=4)
    enqueue(world, "small", devices_needed=1)

    assert take(world, shared_slot=False).subject_id == "small"
    with world.database.write() as session:
        assert claim(session, shared_slot=False) is None


def test_on_a_node_without_gpus_any_task_takes_one_slot(world: World):
    enqueue(world, "large", devices_needed=4)

    assert take(world, shared_slot=True).devices == ("slot:0",)


def test_devices_of_another_node_are_free(world: World):
    enqueue(world, "job-1", "job-2", devices_needed=1)
    first = take(world, devices=["cuda:0"])
    elsewhere = tasks.Owner(node="node-2", pid=1, started_at=1.0)

    second = take(world, devices=["cuda:0"], owner=elsewhere)

    assert first.devices == second.devices == ("cuda:0",)


def test_a_kind_of_work_exists_once_for_a_subject(world: World):
    enqueue(world, "job-1")

    with pytest.raises(IntegrityError):
        enqueue(world, "job-1")


def test_a_renewal_extends_the_lease_and_keeps_it_from_the_reaper(world: World):
    enqueue(world, "job-1")
    lease = take(world)
    world.expire(lease)

    with world.database.write() as session:
        assert [found.token for found in tasks.expired(session, ttl_s=0)] == [lease.token]
        tasks.check(session, lease, ttl_s=60)
        assert tasks.expired(session, ttl_s=0) == []
        expires_at = session.scalars(select(Task.lease_expires_at)).one()
        assert expires_at is not None
        assert 55 < expires_at - clock(session) <= 60


def test_a_check_without_a_ttl_does_not_renew(world: World):
    enqueue(world, "job-1")
    lease = take(world)
    before = row(world, Task, lease.task_id)

    with tasks.fenced(world.database, lease):
        pass

    assert row(world, Task, lease.task_id) == before


def lose(world: World, lease: Lease) -> bool | None:
    """What the reaper does with a lease that ran out."""
    world.expire(lease)
    with world.database.write() as session:
        (found,) = tasks.expired(session, ttl_s=0)
        assert (found.attempt_id, found.token) == (lease.attempt_id, lease.token)
        return tasks.take_away(session, found)


def test_a_stale_owner_writes_nothing(world: World):
    enqueue(world, "job-1")
    stale = take(world)
    lose(world, stale)
    owner = take(world)
    assert owner.token == stale.token + 1
    before = row(world, Task, owner.task_id), row(world, Attempt, stale.attempt_id)

    for write in (
        lambda session: tasks.finish(session, stale, outcome="done"),
        lambda session: tasks.requeue(session, stale, outcome="stopped", charge=True),
        lambda session: tasks.enqueue(session, kind="merge", subject_id="job-1", org_id=world.org_id),
    ):
        with pytest.raises(LeaseLost), tasks.fenced(world.database, stale) as session:
            write(session)
    with pytest.raises(LeaseLost), world.database.write() as session:
        tasks.check(session, stale, ttl_s=60)
    with world.database.write() as session:
        assert tasks.take_away(session, stale) is None

    assert (row(world, Task, owner.task_id), row(world, Attempt, stale.attempt_id)) == before
    with world.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Task)) == 1
        tasks.check(session, owner)


def test_a_lost_attempt_is_charged_and_the_last_one_closes_the_task(world: World):
    (task,) = enqueue(world, "job-1", max_attempts=2)

    assert lose(world, take(world)) is True
    assert (row(world, Task, task.id)["status"], row(world, Task, task.id)["charged"]) == ("queued", 1)
    assert lose(world, take(world)) is False
    assert row(world, Task, task.id)["status"] == "closed"
    with world.database.write() as session:
        assert claim(session) is None
        assert set(session.scalars(select(Attempt.outcome))) == {"lost"}


def test_work_given_back_without_a_charge_is_never_used_up(world: World):
    (task,) = enqueue(world, "job-1", max_attempts=1)

    for token in (1, 2, 3):
        lease = take(world)
        assert lease.token == token
        with tasks.fenced(world.database, lease) as session:
            assert tasks.requeue(session, lease, outcome="stopped", charge=False)
    assert row(world, Task, task.id)["charged"] == 0
    lease = take(world)
    with tasks.fenced(world.database, lease) as session:
        assert not tasks.requeue(session, lease, outcome="failed", charge=True)
    assert row(world, Task, task.id)["status"] == "closed"


def test_work_given_back_with_a_delay_rests(world: World):
    enqueue(world, "job-1")
    lease = take(world)
    with tasks.fenced(world.database, lease) as session:
        tasks.requeue(session, lease, outcome="failed", charge=True, delay_s=30)
        assert claim(session) is None
    world.skip_delays()
    assert take(world).token == 2


def test_devices_of_a_lost_attempt_stay_held_until_proven_free(world: World):
    enqueue(world, "job-1", "job-2", devices_needed=1)
    lease = take(world, devices=["cuda:0"])
    with world.database.read() as session:
        assert [attempt.id for attempt in tasks.live_attempts(session, "node-1")] == [lease.attempt_id]
        assert tasks.unproven_attempts(session, "node-1") == []

    lose(world, lease)

    with world.database.write() as session:
        assert claim(session, devices=["cuda:0"]) is None
        assert tasks.live_attempts(session, "node-1") == []
        assert [attempt.id for attempt in tasks.unproven_attempts(session, "node-1")] == [lease.attempt_id]
        assert tasks.unproven_attempts(session, "node-2") == []
        tasks.release_devices(session, lease.attempt_id)
        assert tasks.unproven_attempts(session, "node-1") == []
        assert claim(session, devices=["cuda:0"]) is not None


def test_a_restarted_postgresql_expires_nobody_for_a_ttl(world: World):
    enqueue(world, "job-1")
    lease = take(world)
    world.expire(lease)
    since_the_epoch_s = 1e10  # no server has been up for that long

    with world.database.read() as session:
        found = tasks.expired(session, ttl_s=since_the_epoch_s)
        spared = world.database.engine.dialect.name == "postgresql"
        assert [other.token for other in found] == ([] if spared else [lease.token])
        assert len(tasks.expired(session, ttl_s=0)) == 1


class Watched(Database):
    """Tells when somebody is about to write."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.about_to_write = threading.Event()

    @contextmanager
    def write(self) -> Iterator[Session]:
        self.about_to_write.set()
        with super().write() as session:
            yield session


def test_the_reaper_spares_a_lease_renewed_after_it_looked(world: World):
    world.add_job()
    lease = world.take()
    world.expire(lease)
    watched = Watched(world.database.url)
    taken = []
    reaper = threading.Thread(target=lambda: taken.append(recovery.reap(watched, ttl_s=0)))

    with world.database.write() as session:
        tasks.check(session, lease, ttl_s=60)
        reaper.start()
        assert watched.about_to_write.wait(10)
    reaper.join()
    watched.dispose()

    assert taken == [0]
    assert world.task(lease.subject_id).token == lease.token
    assert world.task(lease.subject_id).status == "leased"


def test_two_reapers_take_a_lease_once(world: World):
    job = world.add_job()
    lease = world.take()
    world.expire(lease)

    counts = race(*[lambda: recovery.reap(world.database, ttl_s=0)] * 4)

    assert sorted(counts) == [0, 0, 0, 1]
    assert world.history(job.id) == ["queued", "running", "queued"]
    assert world.task(job.id).charged == 1


def test_the_work_of_a_dead_process_is_given_back_at_once(world: World):
    job = world.add_job()
    lease = world.take()

    assert recovery.abandon(world.database, lease.attempt_id)
    assert not recovery.abandon(world.database, lease.attempt_id)

    assert world.job(job.id).status == "queued"
    assert [attempt.outcome for attempt in world.attempts(job.id)] == ["lost"]
