"""What cannot be proven free is used by nobody until it is, or an admin vouches for it.

What stands for an unkillable process here are some that come back: shells without the marker start them
again each time they are killed, so that every sweep finds one, also on a machine so busy that a single shell
would be too late. An uninterruptible sleep cannot be made at will.
"""

import subprocess
from collections.abc import Iterator

import pytest

from db import quarantine, tasks
from db.tasks import Lease, Owner
from tests.db.world import World, claim
from workers import leases, processes

GPUS = ["cuda:0", "cuda:1"]
COMES_BACK = 'while :; do env "$0" sleep 1000; done'


def take(world: World) -> Lease | None:
    pid, started_at = processes.identity()  # an owner that lives
    with world.database.write() as session:
        owner = Owner(node="node-1", pid=pid, started_at=started_at)
        return claim(session, owner=owner, devices=GPUS, shared_slot=False)


@pytest.fixture
def lost(world: World) -> Lease:
    """An attempt that was given up while its processes ran."""
    for subject in ("one", "two", "three"):
        with world.database.write() as session:
            tasks.enqueue(session, kind="train", subject_id=subject, org_id=world.org_id, devices_needed=1)
    lease = take(world)
    assert lease is not None
    with world.database.write() as session:
        tasks.take_away(session, lease)
    return lease


@pytest.fixture
def undead(world: World, lost: Lease) -> Iterator[list[subprocess.Popen[bytes]]]:
    mark = leases.marker(world.database, lost)
    shell = ["/bin/sh", "-c", COMES_BACK, f"{processes.MARKER}={mark}"]
    shells = [subprocess.Popen(shell) for _ in range(8)]
    while len(processes.carrying(mark)) < len(shells):
        assert all(one.poll() is None for one in shells)
    yield shells
    let_die(shells)
    assert processes.sweep(mark)


def let_die(shells: list[subprocess.Popen[bytes]]) -> None:
    for shell in shells:
        shell.kill()
        shell.wait()


def recover(world: World, *, unkillable_s: float = 0.0) -> None:
    leases.recover_node(world.database, "node-1", unkillable_s=unkillable_s, sweep_s=0.2)


def reasons(world: World) -> dict[tuple[str, str], str]:
    with world.database.read() as session:
        return quarantine.reasons(session)


def test_what_does_not_die_is_quarantined_after_a_while_and_freed_once_it_is_gone(
    world: World, lost: Lease, undead: list[subprocess.Popen[bytes]]
):
    recover(world, unkillable_s=60.0)
    assert reasons(world) == {}
    recover(world)
    recover(world)
    assert reasons(world) == {("node-1", "cuda:0"): "its processes do not die"}
    other = take(world)
    assert other is not None
    assert other.devices == ("cuda:1",)
    assert take(world) is None

    let_die(undead)
    recover(world)

    assert reasons(world) == {}
    again = take(world)
    assert again is not None
    assert again.devices == lost.devices


def test_an_admin_may_vouch_for_a_device(world: World, lost: Lease, undead: list[subprocess.Popen[bytes]]):
    recover(world)
    assert all(shell.poll() is None for shell in undead)
    with world.database.write() as session:
        quarantine.release(session, "node-1", "cuda:0")

    again = take(world)
    assert again is not None
    assert again.devices == lost.devices


def test_an_attempt_that_ends_without_proof_keeps_its_devices(world: World, lost: Lease):
    recover(world)
    lease = take(world)
    assert lease is not None
    with tasks.fenced(world.database, lease) as session:
        tasks.finish(session, lease, outcome="failed")
        tasks.keep_devices(session, lease)

    other = take(world)
    assert other is not None
    assert set(other.devices).isdisjoint(lease.devices)
    assert lease.attempt_id != lost.attempt_id


def test_a_device_that_somebody_else_uses_is_claimed_by_nobody(world: World, lost: Lease):
    recover(world)
    with world.database.write() as session:
        assert quarantine.put(session, "node-1", "cuda:0", reason="process 7 computes on it")
        assert not quarantine.put(session, "node-1", "cuda:0", reason="again")
    lease = take(world)
    assert lease is not None
    assert lease.devices == ("cuda:1",) != lost.devices
    assert take(world) is None
    with world.database.write() as session:
        assert quarantine.busy_by_others(session, "node-1") == {"cuda:0"}
        quarantine.lift(session, "node-1", device="cuda:0")
    assert take(world) is not None


def test_processes_of_this_installation_are_told_from_others(
    world: World, lost: Lease, undead: list[subprocess.Popen[bytes]]
):
    ours, *_ = processes.carrying(leases.marker(world.database, lost))
    assert processes.is_ours(world.database.url)(ours.pid)
    assert not processes.is_ours(world.database.url)(undead[0].pid)
    assert not processes.is_ours("sqlite:///another.db")(ours.pid)
