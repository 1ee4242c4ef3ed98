"""Tasks of many devices are passed by smaller ones, but do not starve, and no device is leased twice (G9)."""

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from db import tasks
from db.tasks import Lease
from db.work_models import Attempt, DeviceLease, Task
from tests.db.world import World, claim, race

pytestmark = pytest.mark.faults(g=9, everyday=True)
T = TypeVar("T")
GPUS = ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
CLAIMERS = 8
TASKS = 1000


def enqueue(world: World, *sizes: int, priority: int = 0) -> list[int]:
    """Waiting tasks of so many devices each; their ids."""
    with world.database.write() as session:
        return [
            tasks.enqueue(
                session,
                kind="train",
                subject_id=f"job-{size}-{number}-{priority}",
                org_id=world.org_id,
                devices_needed=size,
                priority=priority,
            ).id
            for number, size in enumerate(sizes)
        ]


def take(world: World, **changes: Any) -> Lease | None:
    with world.database.write() as session:
        return claim(session, **({"devices": GPUS, "shared_slot": False, "passing_s": 0.0} | changes))


def finish(world: World, lease: Lease | None) -> None:
    assert lease is not None
    with tasks.fenced(world.database, lease) as session:
        tasks.finish(session, lease, outcome="done")


def patiently(write: Callable[[], T]) -> T:
    """SQLite does not serve those in turn who wait for its one lock: some wait too long."""
    while True:
        try:
            return write()
        except OperationalError as error:
            if "locked" not in str(error):
                raise


def test_what_fits_passes_for_a_while_and_then_the_node_keeps_its_devices(world: World):
    first, large, small, smaller = enqueue(world, 2, 4, 2, 1)
    running = take(world)
    assert running is not None
    assert running.task_id == first
    passing = take(world, passing_s=60.0)
    assert passing is not None
    assert passing.task_id == small
    finish(world, passing)

    assert take(world) is None, "two are free, but the large one has waited long enough"
    finish(world, running)
    fair = take(world)

    assert fair is not None
    assert (fair.task_id, len(fair.devices)) == (large, 4)
    finish(world, fair)
    last = take(world)
    assert last is not None
    assert last.task_id == smaller


def test_what_is_more_urgent_still_passes(world: World):
    _, large = enqueue(world, 2, 4)
    assert take(world) is not None
    (urgent,) = enqueue(world, 1, priority=1)

    lease = take(world)

    assert lease is not None
    assert lease.task_id == urgent
    with world.database.read() as session:
        assert session.get_one(Task, large).status == "queued"


def test_what_the_node_can_never_run_keeps_nobody_waiting(world: World):
    enqueue(world, 2, 8, 1)
    assert take(world) is not None

    lease = take(world)

    assert lease is not None
    assert len(lease.devices) == 1


@pytest.mark.long
def test_a_thousand_mixed_tasks_share_no_device_and_none_starves(world: World):
    order = enqueue(world, *random.Random(9).choices([1, 2, 4], k=TASKS))
    held: set[str] = set()
    done: list[int] = []
    freed = threading.Condition()

    def work() -> None:
        while len(done) < TASKS:
            lease = patiently(lambda: take(world))
            if lease is None:
                with freed:
                    freed.wait(timeout=1.0)
                continue
            with freed:
                assert held.isdisjoint(lease.devices)
                held.update(lease.devices)
            with freed:  # from the commit on another owner may have them
                held.difference_update(lease.devices)
            patiently(lambda lease=lease: finish(world, lease))
            with freed:
                done.append(lease.task_id)
                freed.notify_all()

    assert race(*[work] * CLAIMERS) == [None] * CLAIMERS

    with world.database.read() as session:
        started = list(session.scalars(select(Attempt.task_id).order_by(Attempt.started_at, Attempt.id)))
        leases = list(
            session.scalars(select(DeviceLease).order_by(DeviceLease.device, DeviceLease.leased_at))
        )
    assert sorted(started) == sorted(order)
    for before, after in itertools.pairwise(leases):
        if before.device == after.device:
            assert before.released_at is not None
            assert before.released_at <= after.leased_at
    waited = {task_id: position for position, task_id in enumerate(started)}
    # In turn, the task at place n of the queue starts after n others.
    late = {n: waited[task_id] for n, task_id in enumerate(order) if waited[task_id] > 2 * n + CLAIMERS}
    assert late == {}
