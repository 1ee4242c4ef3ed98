"""Why a job has not started, and when it may: places, reasons and times, on the job itself."""

from typing import Any

import pytest
from sqlalchemy import select, update

from db import claims, disk, jobs, nodes, quarantine, tasks
from db.models import Job, Model
from db.nodes import Device, Facts
from db.session import clock
from db.tasks import Lease, Owner
from db.work_models import Node, Task

JOBS = "/v1/fine_tuning/jobs"
on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def body(world) -> dict[str, Any]:
    return {"model": world.base_model(), "training_file": world.file()}


def create(client, body, **more: Any) -> str:
    answer = client.post(JOBS, json=body | more)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def see(client, job_id: str) -> tuple[Any, Any, Any]:
    job = client.get(f"{JOBS}/{job_id}").json()
    return job["queue_position"], job["blocked_by"], job["expected_start_at"]


def start(world, devices: list[str], *, eta_s: float | None = None) -> tuple[Lease, float | None]:
    """Claim the next job, which runs for as long as it says; the lease, and when it will be over."""
    with world.database.write() as session:
        lease = claims.claim(
            session,
            queue="train",
            owner=Owner(node="node", pid=1, started_at=1.0),
            devices=devices,
            shared_slot=devices[0].startswith("slot:"),
            ttl_s=60,
        )
        assert lease is not None
        job = jobs.start(session, lease, resolved={"n_epochs": 1})
        if eta_s is None:
            return lease, None
        jobs.set_progress(session, job, {"step": 1, "total_steps": 9, "eta_seconds": eta_s})
        return lease, clock(session) + eta_s


@on_both
def test_higher_priorities_are_started_first(client, world, body):
    low, usual, high = (create(client, body, priority=priority) for priority in (-1, 0, 10))
    assert [see(client, job)[0] for job in (low, usual, high)] == [2, 1, 0]
    assert see(client, low)[1] == [{"reason": "earlier_jobs", "count": 2}]
    assert see(client, high)[1] == [{"reason": "worker"}]
    started = [start(world, ["slot:0", "slot:1", "slot:2"])[0] for _ in range(3)]
    assert [lease.subject_id for lease in started] == [high, usual, low]
    for lease in started:  # and so are their merges
        with tasks.fenced(world.database, lease) as session:
            jobs.finish_training(session, lease, exit_={})
    assert [world.claim("cpu").subject_id for _ in range(3)] == [high, usual, low]


@on_both
def test_a_waiting_job_says_what_for(client, world, body):
    unchecked = world.file(checked=False)
    job = create(client, body, validation_file=unchecked)
    assert see(client, job) == (None, [{"reason": "file", "id": unchecked}], None)
    world.check_file(unchecked)
    lease, _ = start(world, ["slot:0"])
    assert see(client, job) == (None, None, None)
    waits = create(client, body)
    assert see(client, waits)[1] == [{"reason": "devices", "needed": 1, "held": 1}]
    with tasks.fenced(world.database, lease) as session:
        jobs.give_back(session, lease, exit_=None, charge=True, why="The trainer was killed")
    with world.database.read() as session:
        until = session.scalars(select(Task.not_before).where(Task.subject_id == job)).one()
    assert see(client, job)[1] == [{"reason": "pause_after_failure", "until": int(until)}]
    client.post(f"{JOBS}/{job}/pause")
    assert see(client, job) == (None, [{"reason": "paused"}], None)
    assert client.get(JOBS).json()["data"][0]["blocked_by"] is None  # lists stay short


@on_both
def test_a_stage_waits_for_others(client, body):
    stages = [
        body | {"name": "pt", "method": {"type": "supervised"}},
        {"name": "sft", "model": {"stage": "pt"}, "training_file": body["training_file"]},
    ]
    made = client.post("/v1/pipelines", json={"name": "p", "stages": stages}).json()["stages"]
    first, second = (stage["job_id"] for stage in made)
    assert see(client, second)[1] == [{"reason": "stage", "id": first, "name": "pt", "status": "queued"}]


@on_both
def test_the_start_follows_from_the_jobs_that_run(client, world, body):
    for _ in range(2):
        create(client, body)
    slots = ["slot:0", "slot:1"]
    _, second_end = start(world, slots, eta_s=500)
    _, first_end = start(world, slots, eta_s=100)
    waiting = [create(client, body) for _ in range(3)]
    expected = [see(client, job)[2] for job in waiting]
    assert expected[0] == pytest.approx(first_end, abs=2)
    assert expected[1] == pytest.approx(second_end, abs=2)
    assert expected[2] is None  # how long those before it take nobody knows


def test_nobody_knows_when_a_job_ends_that_does_not_say(client, world, body):
    create(client, body)
    start(world, ["slot:0"])
    assert see(client, create(client, body))[2] is None


@on_both
def test_a_job_on_two_gpus_waits_for_two(client, world, body):
    for _ in range(2):
        create(client, body)
    gpus = ["cuda:0", "cuda:1"]
    _, second_end = start(world, gpus, eta_s=500)
    start(world, gpus, eta_s=100)
    two = create(client, body, resources={"nproc_per_node": 2})
    position, blocked_by, expected = see(client, two)
    assert (position, blocked_by) == (0, [{"reason": "devices", "needed": 2, "held": 2}])
    assert expected == pytest.approx(second_end, abs=2)
    assert see(client, create(client, body))[2] is None  # the other one takes both
    three = create(client, body, resources={"nproc_per_node": 3}, priority=1)
    assert see(client, three)[2] is None


def test_devices_that_are_not_proven_free_are_not_counted_on(client, world, body):
    job = create(client, body)
    lease, _ = start(world, ["slot:0"], eta_s=100)
    with world.database.write() as session:
        assert tasks.take_away(session, lease)
        jobs.after_interruption(session, lease, again=True, why="Worker lost")
        assert session.get_one(Job, job).status == "queued"
    assert see(client, job)[1:] == ([{"reason": "devices", "needed": 1, "held": 1}], None)


def report(world, name: str = "node", *, gpus: int = 4, free_bytes: int = 10**12) -> None:
    """A node that trains, just seen."""
    devices = tuple(Device(f"cuda:{number}", kind="H100") for number in range(gpus))
    with world.database.write() as session:
        facts = Facts(name, "10.0.0.1", devices, slots=2, free_bytes=free_bytes)
        nodes.report(session, facts, every_s=0, trains=True)


@on_both
@pytest.mark.parametrize(
    ("resources", "obstacle"),
    [
        ({"nproc_per_node": 8}, {"reason": "too_few_devices", "needed": 8, "most": 4}),
        ({"nproc_per_node": 4, "nnodes": 2}, {"reason": "too_few_nodes", "needed": 2, "there": 1}),
        ({"nproc_per_node": 4}, None),
    ],
)
def test_what_no_machine_can_take_is_told(client, world, body, resources, obstacle):
    report(world)
    report(world, "small", gpus=2)
    job = create(client, body, resources=resources)
    _, reasons, starts_at = see(client, job)
    assert reasons == [obstacle or {"reason": "worker"}]
    assert obstacle is None or starts_at is None


@on_both
def test_machines_out_of_service_are_told(client, world, body):
    report(world)
    job = create(client, body, resources={"nproc_per_node": 2})
    with world.database.write() as session:
        nodes.set_state(session, "node", "draining")
    assert see(client, job)[1:] == ([{"reason": "draining", "nodes": ["node"]}], None)
    with world.database.write() as session:
        nodes.set_state(session, "node", "active")
        for device in ("cuda:0", "cuda:1", "cuda:2"):
            quarantine.put(session, "node", device, reason="a stranger is on it")
    assert see(client, job)[1] == [{"reason": "quarantined", "devices": 3}]
    with world.database.write() as session:
        session.execute(update(Node).values(last_seen_at=1.0))
    assert see(client, job)[1] == [{"reason": "worker"}], "nobody is there at all"


@on_both
def test_a_disk_without_room_is_told(client, world, body):
    report(world, free_bytes=1000)
    whole = {"type": "supervised", "supervised": {"hyperparameters": {"use_peft": False}}}
    adapter, full = create(client, body), create(client, body, method=whole)
    with world.database.write() as session:
        session.execute(update(Model).values(details={"bytes": 1000}))
        needed = 2 * disk.estimate_checkpoints_bytes(session, [full])[full]
    assert needed > 1000
    assert see(client, adapter)[1] == [{"reason": "worker"}]
    told = {"reason": "disk", "needed_bytes": needed, "free_bytes": 1000}
    assert see(client, full)[1] == [told, {"reason": "earlier_jobs", "count": 1}]
