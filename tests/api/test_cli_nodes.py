"""The command line: the machines that workers run on."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.cli_peer import Peer, run, serve

NODE: dict[str, Any] = {
    "object": "node",
    "name": "host-1",
    "state": "active",
    "address": "10.0.0.1",
    "slots": 1,
    "free_bytes": 5_000_000_000,
    "last_seen_at": 1700000000,
    "devices": [
        {
            "id": "cuda:0",
            "kind": "NVIDIA H100",
            "memory_bytes": 80_000_000_000,
            "driver": "580.1",
            "state": "leased",
            "reason": None,
            "held_by": "ftjob-1",
        }
    ],
}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    with serve() as peer:
        monkeypatch.setenv("RESIDENCY_URL", peer.url)
        monkeypatch.setenv("RESIDENCY_API_KEY", "sk-test")
        yield peer


def test_nodes_lists_a_row_a_device(peer: Peer) -> None:
    peer.answers("GET /v1/nodes", {"object": "list", "data": [NODE]})
    (row,) = run("nodes").stdout.splitlines()[-1:]
    for word in ("host-1", "active", "5.0 GB", "cuda:0", "NVIDIA H100", "80.0 GB", "leased", "ftjob-1"):
        assert word in row
    assert json.loads(run("nodes", "--json").stdout) == [NODE]


def test_release_names_the_device(peer: Peer) -> None:
    peer.answers("POST /v1/nodes/host-1/devices/cuda%3A0/release", NODE)
    assert run("nodes", "release", "host-1", "cuda:0").stdout == "host-1  cuda:0  released\n"


def test_drain_and_undrain_name_the_node(peer: Peer) -> None:
    for verb, state in (("drain", "draining"), ("undrain", "active")):
        peer.answers(f"POST /v1/nodes/host-1/{verb}", NODE | {"state": state})
        assert run("nodes", verb, "host-1").stdout == f"host-1  {state}\n"
