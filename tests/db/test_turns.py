"""Tenants take turns: a flood delays nobody for long, and each place in the queue is the true one (G33)."""

import itertools
import random
from collections.abc import Iterator

import pytest
from sqlalchemy import insert, select

from db import tasks, turns, waiting
from db.models import Job
from db.tasks import Lease, Owner
from db.work_models import Task
from tests.db.world import World, claim

pytestmark = pytest.mark.faults(g=33, everyday=True)
FLOOD = 5000
GPUS = ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
SLOTS = [f"slot:{number}" for number in range(40)]
_ages = itertools.count(1.0)


@pytest.fixture
def tenants(world: World) -> list[World]:
    """Three of them in one database."""
    return [world, world.other("b"), world.other("c")]


def enqueue(tenant: World, count: int, *, name: str = "", devices: int = 1, priority: int = 0) -> list[str]:
    """So many waiting tasks, oldest first, in one statement."""
    subjects = [f"{tenant.org_id}{name}{priority}-{number}" for number in range(count)]
    same = {
        "kind": "train",
        "queue": "train",
        "org_id": tenant.org_id,
        "status": "queued",
        "priority": priority,
        "devices_needed": devices,
        "nodes_needed": 1,
        "token": 0,
        "charged": 0,
        "max_attempts": 3,
        "not_before": 1.0,
    }
    rows = [same | {"subject_id": subject, "created_at": next(_ages)} for subject in subjects]
    with tenant.database.write() as session:
        session.execute(insert(Task), rows)
    return subjects


def take(world: World, devices: list[str], *, node: str = "node-1") -> Lease:
    with world.database.write() as session:
        owner = Owner(node=node, pid=1, started_at=1.0)
        gpus = devices[0].startswith("cuda")
        lease = claim(session, devices=devices, shared_slot=not gpus, owner=owner, passing_s=0.0)
    assert lease is not None
    return lease


def finish(world: World, lease: Lease) -> None:
    with tasks.fenced(world.database, lease) as session:
        tasks.finish(session, lease, outcome="done")


def serve(world: World, *, slots: int = 1) -> Iterator[str]:
    """The subjects in the order in which they start on so many slots, of which the oldest ends first."""
    running: list[Lease] = []
    while True:
        if len(running) == slots:
            finish(world, running.pop(0))
        running.append(take(world, SLOTS[:slots]))
        yield running[-1].subject_id


def test_one_task_is_next_however_many_another_tenant_has(tenants: list[World]):
    many, one, _ = tenants
    enqueue(many, 50, priority=10)
    started = serve(many)
    assert [next(started) for _ in range(3)] == [f"{many.org_id}10-{number}" for number in range(3)]

    (late,) = enqueue(one, 1)

    assert next(started) == late
    assert next(started) == f"{many.org_id}10-3"


def test_equal_tenants_alternate(tenants: list[World]):
    queues = [enqueue(tenant, 4) for tenant in tenants]

    started = serve(tenants[0])

    assert [next(started) for _ in range(12)] == [
        subject for turn in zip(*queues, strict=True) for subject in turn
    ]


def test_the_fewest_leases_come_first(tenants: list[World]):
    first, second, _ = tenants
    enqueue(first, 9)
    for _ in range(3):
        take(first, SLOTS)
    enqueue(second, 9)

    owners = [take(first, SLOTS).org_id for _ in range(7)]

    # Three to catch up with, and then in turn.
    assert owners == [second.org_id] * 3 + [first.org_id, second.org_id] * 2


def test_leases_of_another_queue_do_not_count(tenants: list[World]):
    first, second, _ = tenants
    with first.database.write() as session:
        for number in range(2):
            tasks.enqueue(session, kind="validate", subject_id=f"file-{number}", org_id=first.org_id)
            assert claim(session, "cpu") is not None
    (older,) = enqueue(first, 1)
    enqueue(second, 1)

    assert take(first, SLOTS).subject_id == older


def test_priority_and_age_order_the_tasks_of_one_tenant(tenants: list[World]):
    first, second, _ = tenants
    low, usual, high = (enqueue(first, 2, priority=priority) for priority in (-1, 0, 1))
    others = enqueue(second, 6, priority=5)

    started = list(itertools.islice(serve(first), 12))

    assert [subject for subject in started if subject not in others] == [*high, *usual, *low]
    assert [subject for subject in started if subject in others] == others


@pytest.mark.parametrize("slots", [1, 4])
def test_a_flood_at_most_doubles_the_time_of_others(tenants: list[World], slots: int):
    flooding, *others = tenants
    started = serve(flooding, slots=slots)

    def measure(name: str) -> list[int]:
        """How many tasks start before each task of the others, once these are made."""
        mine = {subject for tenant in others for subject in enqueue(tenant, 10, name=name)}
        found: list[int] = []
        for number, subject in enumerate(itertools.islice(started, 100)):
            found += [number] if subject in mine else []
            if len(found) == len(mine):
                return found
        raise AssertionError(f"only {len(found)} of {len(mine)} were among the first hundred")

    alone = measure("alone")
    enqueue(flooding, FLOOD, priority=10)
    for _ in range(slots):
        next(started)
    flooded = measure("flooded")

    # Counted in ends of tasks, of which so many happen while one runs. All slots are busy under the flood.
    done = [max(0, number + 1 - slots) + slots for number in alone]
    done_late = [number + 1 + slots for number in flooded]
    assert sum(done_late) <= 2 * sum(done)
    assert done_late[-1] <= 2 * done[-1]


def test_what_needs_several_devices_is_passed_by_another_tenant_once(tenants: list[World]):
    first, second, _ = tenants
    enqueue(first, 1, name="elsewhere")
    take(first, GPUS[:1], node="node-2")  # so that the first always holds more
    (large,) = enqueue(first, 1, name="large", devices=4)
    enqueue(second, 9)

    passing = take(first, GPUS)
    assert passing.org_id == second.org_id
    with first.database.write() as session:
        assert claim(session, devices=GPUS, shared_slot=False, passing_s=0.0) is None
    finish(first, passing)

    assert take(first, GPUS).subject_id == large


def test_a_tenant_that_was_never_served_passes_what_keeps_devices(tenants: list[World]):
    first, second, _ = tenants
    enqueue(first, 2, devices=3)
    take(first, GPUS)
    (small,) = enqueue(second, 1)

    assert take(first, GPUS).subject_id == small


@pytest.mark.parametrize("seed", range(4))
def test_places_are_the_order_of_claims(tenants: list[World], seed: int):
    chance = random.Random(seed)
    file_ids = [tenant.add_file() for tenant in tenants]

    def add_some() -> None:
        for tenant, file_id in zip(tenants, file_ids, strict=True):
            for _ in range(chance.choice([0, 1, 2, 4])):
                tenant.add_job(file_id, priority=chance.choice([0, 0, 1]))

    add_some()
    for _ in range(chance.randrange(6)):
        lease = tenants[0].claim(devices=SLOTS)
        if lease is not None and chance.random() < 0.3:
            finish(tenants[0], lease)
    add_some()
    add_some()

    with tenants[0].database.read() as session:
        jobs = list(
            session.scalars(select(Job).join(Task, Task.subject_id == Job.id).where(Task.status == "queued"))
        )
        waits = {job.id: waiting.explain(session, job) for job in jobs}
        told = {job_id: wait.position for job_id, wait in waits.items() if wait}
        last = max(told, key=lambda job_id: told[job_id] or 0)
        own = session.scalars(select(Task).where(Task.subject_id == last)).one()
        listed = turns.list_first(session, "train", turns.count_before(session, own))
    claimed = [take(tenants[0], SLOTS).subject_id for _ in told]

    assert {job_id: position for position, job_id in enumerate(claimed)} == told
    assert [task.subject_id for task in listed] == claimed[:-1]
