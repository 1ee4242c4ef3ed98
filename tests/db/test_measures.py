"""What the tables tell of how the service does: each fault shows under a name of its own (G36)."""

from sqlalchemy import update

from db import jobs, measures, quarantine, recovery, tasks
from db.measures import Values
from db.nodes import Device, DeviceUse, Facts, report
from db.work_models import Node, Task
from tests.db.world import World


def read(world: World) -> dict[str, Values]:
    with world.database.read() as session:
        return {measure.name: values for measure, values in measures.read_all(session)}


def test_an_idle_service_is_all_zeros(world: World) -> None:
    found = read(world)
    assert found["tasks"] == found["lost_attempts"] == found["queue_oldest_seconds"] == {}
    assert found["disk_full"] == found["quarantines"] == {(): 0.0}
    assert found["devices"] == {("free",): 0.0, ("leased",): 0.0, ("quarantined",): 0.0}


def test_work_that_waits_has_an_age_until_it_is_claimed(world: World) -> None:
    job = world.add_job()
    earlier = {"created_at": Task.created_at - 100, "not_before": Task.not_before - 100}
    world.run(update(Task).where(Task.subject_id == job.id).values(**earlier))
    waiting = read(world)
    assert waiting["tasks"][("train", "queued")] == 1.0
    assert 100 <= waiting["queue_oldest_seconds"][("train",)] < 160
    assert waiting["jobs"][("queued",)] == 1.0
    world.take()
    running = read(world)
    assert running["tasks"][("train", "leased")] == 1.0
    assert ("train",) not in running["queue_oldest_seconds"]
    assert running["claims"][("train",)] == 1.0


def test_a_worker_that_fell_silent_shows(world: World) -> None:
    world.add_job()
    lease = world.take()
    assert read(world)["lost_attempts"] == {}
    world.expire(lease)
    recovery.reap(world.database, ttl_s=0)
    found = read(world)
    assert found["lost_attempts"] == {("train",): 1.0}
    assert found["attempts"][("train", "lost")] == 1.0


def test_a_full_disk_shows(world: World) -> None:
    world.add_job()
    lease = world.take()
    error = {"code": "disk_full", "message": "No space.", "param": None}
    with tasks.fenced(world.database, lease) as session:
        jobs.fail(session, lease, error=error, exit_={"reason": "disk_full"})
    found = read(world)
    assert found["disk_full"] == {(): 1.0}
    assert found["exits"] == {("train", "disk_full"): 1.0}


def test_machines_and_their_devices_show(world: World) -> None:
    devices = tuple(Device(f"cuda:{index}", kind="H200") for index in range(3))
    uses = {"cuda:0": DeviceUse(memory_used_bytes=70, utilization=0.25)}
    facts = Facts("node-1", "10.0.0.1", devices, slots=3, free_bytes=5_000, uses=uses)
    with world.database.write() as session:
        report(session, facts, every_s=0, trains=True)
        quarantine.put(session, "node-1", "cuda:1", reason="somebody computes on it")
    world.run(update(Node).values(last_seen_at=Node.last_seen_at - 50, state="draining"))
    found = read(world)
    assert found["devices"] == {("free",): 2.0, ("leased",): 0.0, ("quarantined",): 1.0}
    assert found["device_memory_used_bytes"] == {("node-1", "cuda:0"): 70.0}
    assert found["device_utilization"] == {("node-1", "cuda:0"): 0.25}
    assert found["quarantines"] == {(): 1.0}
    assert found["node_free_bytes"] == {("node-1",): 5000.0}
    assert found["node_draining"] == {("node-1",): 1.0}
    assert 50 <= found["node_seen_seconds"][("node-1",)] < 110
    with world.database.write() as session:
        quarantine.release(session, "node-1", "cuda:1")
    found = read(world)
    assert found["devices"][("quarantined",)] == 0.0
    assert found["quarantines"] == {(): 1.0}, "a total never falls"
