"""Gangs: all nodes or none, no two gangs wait for each other, and the end of one member is the end of all."""

from typing import Any

import pytest
from sqlalchemy import select, update

from db import gangs, nodes, tasks
from db.errors import LeaseLost
from db.gangs import Member
from db.nodes import Device, Facts
from db.tasks import Lease, Owner
from db.work_models import DeviceLease, GangMember, Node
from tests.db.world import World, claim, race

GPUS = ["cuda:0", "cuda:1"]


def owner(node: str) -> Owner:
    return Owner(node=node, pid=1, started_at=1.0)


@pytest.fixture
def hosts(world: World) -> list[str]:
    """Two nodes of two GPUs each, just seen."""
    names = ["host-1", "host-2"]
    for name in names:
        devices = tuple(Device(gpu, kind="H100") for gpu in GPUS)
        with world.database.write() as session:
            nodes.report(
                session, Facts(name, "10.0.0.1", devices, slots=2, free_bytes=9), every_s=0, trains=True
            )
    return names


def enqueue(world: World, subject: str, *, devices: int, count: int = 1) -> int:
    with world.database.write() as session:
        task = tasks.enqueue(
            session,
            kind="train",
            subject_id=subject,
            org_id=world.org_id,
            devices_needed=devices,
            nodes_needed=count,
        )
        return task.id


def take(world: World, node: str, **changes: Any) -> Lease | None:
    values: dict[str, Any] = {"devices": GPUS, "shared_slot": False, "passing_s": 0.0}
    with world.database.write() as session:
        return claim(session, owner=owner(node), **(values | changes))


def lead(world: World, node: str) -> Lease:
    lease = take(world, node)
    assert lease is not None
    with world.database.write() as session:
        gangs.open_rendezvous(session, lease.attempt_id, "10.0.0.1:29500")
    return lease


def join(world: World, node: str) -> Member | None:
    with world.database.write() as session:
        return gangs.join(session, owner(node), ttl_s=60)


def member_of(world: World, node: str) -> Member:
    member = join(world, node)
    assert member is not None
    return member


def health(world: World, lease: Lease) -> str:
    with world.database.read() as session:
        return gangs.look_after(session, lease.attempt_id)


def held(world: World) -> set[tuple[str, str]]:
    with world.database.read() as session:
        rows = session.execute(
            select(DeviceLease.node, DeviceLease.device).where(DeviceLease.released_at.is_(None))
        )
        return {(node, device) for node, device in rows}


def test_one_claim_leases_the_devices_of_all_nodes(world: World, hosts: list[str]):
    enqueue(world, "job-1", devices=2, count=2)

    lease = lead(world, "host-2")
    member = member_of(world, "host-1")

    assert held(world) == {(host, gpu) for host in hosts for gpu in GPUS}
    assert (lease.devices, lease.nodes) == (tuple(GPUS), 2)
    assert (member.rank, member.nodes, member.devices) == (1, 2, tuple(GPUS))
    assert (member.subject_id, member.token) == (lease.subject_id, lease.token)
    assert member.rendezvous == "10.0.0.1:29500"
    assert join(world, "host-1") is None, "a second worker of the node"
    assert health(world, lease) == "whole"


def test_nothing_is_leased_unless_all_of_it_is_free(world: World, hosts: list[str]):
    enqueue(world, "small", devices=1)
    small = take(world, "host-2")
    assert small is not None
    enqueue(world, "gang", devices=2, count=2)

    assert take(world, "host-1") is None
    assert held(world) == {("host-2", "cuda:0")}
    with tasks.fenced(world.database, small) as session:
        tasks.finish(session, small, outcome="done")

    assert take(world, "host-1") is not None
    assert len(hosts) == 2


def test_a_waiting_gang_is_not_passed_for_ever(world: World, hosts: list[str]):
    enqueue(world, "running", devices=1)
    assert take(world, hosts[1]) is not None
    enqueue(world, "gang", devices=2, count=2)
    enqueue(world, "late", devices=1)

    assert take(world, "host-1") is None
    assert take(world, "host-2") is None
    passing = take(world, "host-1", passing_s=60.0)

    assert passing is not None
    assert passing.subject_id == "late"


def test_what_fits_is_found_behind_many_gangs_that_do_not(world: World, hosts: list[str]):
    enqueue(world, "running", devices=1)
    assert take(world, hosts[1]) is not None
    for number in range(40):
        enqueue(world, f"gang-{number}", devices=2, count=2)
    enqueue(world, "late", devices=1)

    passing = take(world, hosts[0], passing_s=60.0)

    assert passing is not None
    assert passing.subject_id == "late"


@pytest.mark.parametrize(
    "change",
    [{"state": "draining"}, {"trains_at": 1.0}, {"trains_at": None}],
    ids=["draining", "unseen", "told to stop"],
)
def test_a_gang_that_cannot_come_together_keeps_nobody_waiting(
    world: World, hosts: list[str], change: dict[str, object]
):
    world.run(update(Node).where(Node.name == hosts[1]).values(**change))
    enqueue(world, "gang", devices=1, count=2)
    enqueue(world, "late", devices=1)

    lease = take(world, "host-1")

    assert lease is not None
    assert lease.subject_id == "late"


def test_two_gangs_at_once_are_one_and_then_the_other(world: World, hosts: list[str]):
    for round_ in range(5):
        for subject in ("one", "two"):
            enqueue(world, f"{subject}-{round_}", devices=2, count=2)
        claimed = race(*[lambda node=node: take(world, node) for node in hosts])
        (first,) = [lease for lease in claimed if lease is not None]
        assert isinstance(first, Lease), claimed
        assert len(held(world)) == 4
        for lease in (first, None):
            lease = lease or take(world, hosts[0])
            assert lease is not None
            with tasks.fenced(world.database, lease) as session:
                tasks.finish(session, lease, outcome="done")
            with world.database.write() as session:
                for node in hosts:
                    tasks.release_devices(session, lease.attempt_id, node=node)


def test_the_end_of_the_attempt_is_the_end_of_its_members(world: World, hosts: list[str]):
    enqueue(world, "gang", devices=2, count=2)
    lease = lead(world, hosts[0])
    member = member_of(world, hosts[1])
    with world.database.write() as session:
        gangs.renew(session, member, ttl_s=60, leaving=False)
    with tasks.fenced(world.database, lease) as session:
        tasks.requeue(session, lease, outcome="failed", charge=True)

    with world.database.write() as session, pytest.raises(LeaseLost):
        gangs.renew(session, member, ttl_s=60, leaving=False)
    assert held(world) == {(hosts[1], gpu) for gpu in GPUS}, "until its processes are gone"
    with world.database.read() as session:
        assert [attempt.id for attempt in tasks.unproven_attempts(session, hosts[1])] == [lease.attempt_id]
        assert tasks.unproven_attempts(session, hosts[0]) == []
    with world.database.write() as session:
        gangs.leave(session, member, well=False)
    assert held(world) == set()


def test_a_call_to_an_attempt_that_is_over_is_not_answered(world: World, hosts: list[str]):
    enqueue(world, "gang", devices=2, count=2)
    lease = lead(world, hosts[0])
    with world.database.write() as session:
        tasks.take_away(session, lease)

    assert join(world, hosts[1]) is None


def test_what_the_leader_sees_of_its_members(world: World, hosts: list[str]):
    enqueue(world, "gang", devices=2, count=2)
    lease = lead(world, hosts[0])
    assert health(world, lease) == "gathering"
    member = member_of(world, hosts[1])
    with world.database.write() as session:
        gangs.renew(session, member, ttl_s=60, leaving=True)
    assert health(world, lease) == "leaving"
    world.run(update(GangMember).values(expires_at=1.0))
    assert health(world, lease) == "broken"
    with world.database.write() as session:
        gangs.leave(session, member, well=False)
    assert health(world, lease) == "leaving", "though it had left before its leader looked"
    with world.database.read() as session:
        assert gangs.was_left(session, lease.attempt_id)


def test_a_member_that_fails_breaks_the_gang(world: World, hosts: list[str]):
    enqueue(world, "gang", devices=2, count=2)
    lease = lead(world, hosts[0])
    with world.database.write() as session:
        gangs.leave(session, gangs.join(session, owner(hosts[1]), ttl_s=60), well=False)  # type: ignore[arg-type]

    assert health(world, lease) == "broken"
    with world.database.read() as session:
        assert not gangs.was_left(session, lease.attempt_id)
