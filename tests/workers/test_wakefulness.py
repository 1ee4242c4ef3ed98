"""A lease that ran out while the machine slept is its owner's to renew first."""

import os

import pytest
from sqlalchemy import update

from db.session import clock
from db.tasks import Owner, check
from db.work_models import Task
from tests.db.world import World
from tests.stack import wait_for
from workers import processes, ring
from workers.wakefulness import Wakefulness

TTL_S = 60.0
SHORT_S = 1.0  # PostgreSQL has soon been up for longer


class Clocks:
    """A wall clock, and one that stands still while the machine sleeps."""

    def __init__(self) -> None:
        self.wall_s, self.awake_s = 1.8e9, 1000.0
        self.wakefulness = Wakefulness(wall=lambda: self.wall_s, awake=lambda: self.awake_s)

    def work(self, for_s: float) -> None:
        self.wall_s += for_s
        self.awake_s += for_s

    def sleep(self, for_s: float) -> None:
        self.wall_s += for_s

    def are_owners_heard(self) -> bool:
        return self.wakefulness.has_lasted(TTL_S)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def ask_in_a_child(clocks: Clocks) -> bool:
    """What a process that is forked now would answer."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if clocks.are_owners_heard() else 1)
    return os.waitpid(pid, 0)[1] == 0


def test_children_that_answer_once_share_what_was_seen(clocks: Clocks) -> None:
    clocks.sleep(for_s=8 * 3600)
    assert not ask_in_a_child(clocks)
    clocks.work(for_s=TTL_S / 2)
    assert not ask_in_a_child(clocks), "another process knows of the sleep"
    clocks.work(for_s=TTL_S / 2)
    assert ask_in_a_child(clocks), "and none takes it for a new one"


def test_long_work_is_no_sleep(clocks: Clocks) -> None:
    for _ in range(3):
        clocks.work(for_s=3600)
        assert clocks.are_owners_heard()


def test_after_a_sleep_owners_have_the_life_of_a_lease(clocks: Clocks) -> None:
    clocks.work(for_s=5)
    clocks.sleep(for_s=TTL_S + 1)
    for _ in range(12):
        assert not clocks.are_owners_heard()
        clocks.work(for_s=TTL_S / 12)
    assert clocks.are_owners_heard()


def test_each_sleep_counts_anew(clocks: Clocks) -> None:
    clocks.sleep(for_s=3600)
    assert not clocks.are_owners_heard()
    clocks.work(for_s=TTL_S - 1)
    clocks.sleep(for_s=3600)
    assert not clocks.are_owners_heard()
    clocks.work(for_s=TTL_S - 1)
    assert not clocks.are_owners_heard()
    clocks.work(for_s=1)
    assert clocks.are_owners_heard()


@pytest.mark.parametrize("by_s", [2.0, -2.0, -3600.0])
def test_a_clock_that_is_put_right_is_no_sleep(clocks: Clocks, by_s: float) -> None:
    clocks.sleep(for_s=by_s)
    assert clocks.are_owners_heard()


def expire(world: World) -> None:
    with world.database.write() as session:
        leased = update(Task).where(Task.status == "leased")
        session.execute(leased.values(lease_expires_at=clock(session) - 1))


def test_a_worker_that_wakes_up_leaves_the_lease_of_one_that_lives(world: World, clocks: Clocks) -> None:
    job = world.add_job()
    pid, started_at = processes.identity()
    lease = world.take(owner=Owner(node="node-1", pid=pid, started_at=started_at))
    clocks.sleep(for_s=3600)
    expire(world)
    ring.reap(world.database, clocks.wakefulness, ttl_s=SHORT_S)
    with world.database.write() as session:
        check(session, lease, ttl_s=SHORT_S)  # the owner's heartbeat comes second
    assert world.attempts(job.id)[0].ended_at is None

    clocks.work(for_s=SHORT_S)
    expire(world)

    def is_lost() -> bool:
        ring.reap(world.database, clocks.wakefulness, ttl_s=SHORT_S)
        return world.attempts(job.id)[0].outcome == "lost"

    wait_for(is_lost, within_s=10, what="the end of a lease, on a PostgreSQL that has been up for as long")
