"""Nodes: what workers report of their machines, and nodes that take no work."""

import pytest

from db import nodes
from db.errors import NotFound
from db.nodes import Device, DeviceUse, Facts
from db.work_models import Node, Task
from tests.db.world import World, race

GPU = Device("cuda:0", kind="NVIDIA H100", memory_bytes=80 << 30, driver="580.1")


def facts(name: str = "node-1", *, free_bytes: int = 5, devices: tuple[Device, ...] = (GPU,)) -> Facts:
    return Facts(name, address="10.0.0.1", devices=devices, slots=len(devices), free_bytes=free_bytes)


def report(world: World, facts_: Facts, *, every_s: float = 0.0, trains: bool = True) -> Node:
    with world.database.write() as session:
        nodes.report(session, facts_, every_s=every_s, trains=trains)
    with world.database.read() as session:
        return session.get_one(Node, facts_.name)


def test_a_node_is_known_with_all_it_offers(world: World):
    node = report(world, facts())

    assert (node.state, node.address, node.slots, node.free_bytes) == ("active", "10.0.0.1", 1, 5)
    assert node.devices == [
        {"id": "cuda:0", "kind": "NVIDIA H100", "memory_bytes": 80 << 30, "driver": "580.1"}
    ]


def test_a_report_refreshes_what_is_old_and_keeps_the_state(world: World):
    first = report(world, facts())
    with world.database.write() as session:
        nodes.set_state(session, "node-1", "draining")

    assert report(world, facts(free_bytes=6), every_s=60).free_bytes == 5
    again = report(world, facts(free_bytes=7))

    assert (again.free_bytes, again.state) == (7, "draining")
    assert again.last_seen_at > first.last_seen_at
    assert again.registered_at == first.registered_at


def test_a_device_that_came_is_reported_at_once(world: World):
    report(world, facts())

    node = report(world, facts(devices=(GPU, Device("cuda:1", kind="NVIDIA H100"))), every_s=60)

    assert [device["id"] for device in node.devices] == ["cuda:0", "cuda:1"]


def test_workers_that_start_together_enter_their_node_once(world: World):
    assert race(*[lambda: report(world, facts()).name] * 4) == ["node-1"] * 4


def test_a_draining_node_claims_nothing_until_it_is_let(world: World):
    report(world, facts())
    world.add_job()
    with world.database.write() as session:
        nodes.set_state(session, "node-1", "draining")
    assert world.claim() is None
    assert world.claim("cpu") is None

    with world.database.write() as session:
        nodes.set_state(session, "node-1", "active")
    assert world.claim() is not None


def test_a_heartbeat_keeps_a_node_seen_and_tells_of_the_drain(world: World):
    before = report(world, facts()).last_seen_at
    with world.database.write() as session:
        assert not nodes.touch(session, "node-1", every_s=0.0, trains=True)
        nodes.set_state(session, "node-1", "draining")
        assert nodes.touch(session, "node-1", every_s=60.0, trains=True)

    with world.database.read() as session:
        assert session.get_one(Node, "node-1").last_seen_at > before


def test_a_heartbeat_tells_how_busy_gpus_are_now(world: World):
    def touch(used_bytes: int, *, every_s: float) -> object:
        uses = {"cuda:0": DeviceUse(memory_used_bytes=used_bytes, utilization=0.5)}
        with world.database.write() as session:
            nodes.touch(session, "node-1", every_s=every_s, trains=True, uses=uses)
            return session.get_one(Node, "node-1", populate_existing=True).device_use

    assert report(world, facts()).device_use is None
    assert touch(7, every_s=0.0) == {"cuda:0": {"memory_used_bytes": 7, "utilization": 0.5}}
    assert touch(8, every_s=60.0) == {"cuda:0": {"memory_used_bytes": 7, "utilization": 0.5}}, "too soon"


def test_only_known_nodes_are_drained(world: World):
    with world.database.write() as session, pytest.raises(NotFound):
        nodes.set_state(session, "node-9", "draining")


def full_job(world: World, *, model_bytes: int) -> str:
    world.add_model("large", details={"bytes": model_bytes})
    method = {"type": "supervised", "supervised": {"hyperparameters": {"use_peft": False}}}
    return world.add_job(model="large", spec={"method": method}).id


def test_a_job_whose_checkpoints_would_not_fit_waits_and_lets_others_pass(world: World):
    large = full_job(world, model_bytes=1000)
    small = world.add_job().id

    assert world.take(free_bytes=5999).subject_id == small
    assert world.claim(free_bytes=5999) is None
    assert world.take(free_bytes=6000).subject_id == large


def test_work_that_writes_no_checkpoints_asks_for_no_room(world: World):
    world.upload()

    lease = world.take("cpu", free_bytes=0)

    with world.database.read() as session:
        assert session.get_one(Task, lease.task_id).kind == "validate"


def test_a_task_that_fits_is_found_behind_many_that_do_not(world: World):
    large = full_job(world, model_bytes=1000)
    file_id = world.job(large).training_file
    for seed in range(40):
        world.add_job(file_id, model="large", spec=world.job(large).spec, seed=seed)
    small = world.add_job(file_id).id

    assert world.take(free_bytes=5999).subject_id == small
    assert world.claim(free_bytes=5999) is None


def test_a_node_trains_until_its_worker_is_told_to_stop(world: World):
    assert report(world, facts(), trains=False).trains_at is None
    assert report(world, facts(), every_s=60.0, trains=True).trains_at is not None, "said at once"

    with world.database.write() as session:
        nodes.leave(session, "node-1")
        nodes.touch(session, "node-1", every_s=0.0, trains=False)
    assert report(world, facts(), trains=False).trains_at is None, "its other workers do not train"

    assert report(world, facts(), every_s=60.0, trains=True).trains_at is not None, "started again"
