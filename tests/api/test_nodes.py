"""Nodes over HTTP: admins of the host see them and drain them."""

import pytest

from db import nodes, quarantine
from db.nodes import Device, DeviceUse, Facts


@pytest.fixture
def node(world):
    devices = tuple(Device(f"slot:{index}", kind="cpu") for index in range(2))
    facts = Facts("host-1", address="10.0.0.1", devices=devices, slots=2, free_bytes=7)
    with world.database.write() as session:
        nodes.report(session, facts, every_s=0, trains=True)
    return "host-1"


def test_admins_see_the_nodes_and_who_holds_their_devices(client, node, as_admin):
    answer = client.get("/v1/nodes", headers=as_admin)
    assert answer.status_code == 200, answer.text
    (seen,) = answer.json()["data"]
    assert seen.pop("last_seen_at") > 1_700_000_000
    device = {
        "kind": "cpu",
        "memory_bytes": None,
        "driver": None,
        "memory_used_bytes": None,
        "utilization": None,
        "state": "free",
        "reason": None,
        "held_by": None,
    }
    assert seen == {
        "object": "node",
        "name": node,
        "state": "active",
        "address": "10.0.0.1",
        "slots": 2,
        "free_bytes": 7,
        "devices": [device | {"id": "slot:0"}, device | {"id": "slot:1"}],
    }


def test_gpus_tell_how_busy_they_are(client, world, as_admin):
    devices = tuple(Device(f"cuda:{index}", kind="H200", memory_bytes=100) for index in range(2))
    uses = {"cuda:1": DeviceUse(memory_used_bytes=40, utilization=0.5)}
    facts = Facts("host-2", address="10.0.0.2", devices=devices, slots=2, free_bytes=7, uses=uses)
    with world.database.write() as session:
        nodes.report(session, facts, every_s=0, trains=True)
    (seen,) = client.get("/v1/nodes", headers=as_admin).json()["data"]
    told = [(device["memory_used_bytes"], device["utilization"]) for device in seen["devices"]]
    assert told == [(None, None), (40, 0.5)]


def test_admins_drain_and_undrain(client, node, as_admin):
    def state() -> str:
        return client.get("/v1/nodes", headers=as_admin).json()["data"][0]["state"]

    for verb, expected in (("drain", "draining"), ("drain", "draining"), ("undrain", "active")):
        answer = client.post(f"/v1/nodes/{node}/{verb}", headers=as_admin)
        assert (answer.status_code, answer.json()["state"]) == (200, expected)
        assert state() == expected
    unknown = client.post("/v1/nodes/nobody/drain", headers=as_admin)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


def test_an_admin_vouches_for_a_quarantined_device(client, world, node, as_admin):
    with world.database.write() as session:
        quarantine.put(session, node, "slot:1", reason="process 7 computes on it")

    def devices():
        seen = client.get("/v1/nodes", headers=as_admin).json()["data"][0]["devices"]
        return [(device["state"], device["reason"]) for device in seen]

    assert devices() == [("free", None), ("quarantined", "process 7 computes on it")]
    path = f"/v1/nodes/{node}/devices/slot:1/release"
    assert client.post(path).status_code == 403
    assert client.post(path, headers=as_admin).status_code == 200
    assert devices() == [("free", None), ("free", None)]
    assert client.post(path, headers=as_admin).status_code == 404


def test_users_and_other_organisations_do_not(client, node, as_stranger):
    for headers in ({}, as_stranger):
        for method, path in (("GET", ""), ("POST", f"/{node}/drain"), ("POST", f"/{node}/undrain")):
            answer = client.request(method, f"/v1/nodes{path}", headers=headers)
            assert answer.status_code == 403, (path, answer.text)
