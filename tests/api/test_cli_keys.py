"""The command line: keys."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.cli_peer import Peer, run, serve

KEY: dict[str, Any] = {
    "id": "abc",
    "object": "key",
    "name": "laptop",
    "role": "user",
    "created_at": 1700000000,
    "expires_at": None,
    "last_used_at": 1700000060,
    "revoked_at": None,
}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    with serve() as peer:
        monkeypatch.setenv("RESIDENCY_URL", peer.url)
        monkeypatch.setenv("RESIDENCY_API_KEY", "sk-test")
        yield peer


def test_keys_that_work_are_listed_and_all_when_asked(peer: Peer) -> None:
    keys = [
        KEY,
        KEY | {"id": "soon", "expires_at": time.time() + 60},
        KEY | {"id": "late", "expires_at": 1700000001},
        KEY | {"id": "gone", "revoked_at": 1700000001},
    ]
    peer.answers("GET /v1/keys", {"object": "list", "data": keys, "has_more": False})
    rows = [line.split() for line in run("keys", "list").stdout.splitlines()[1:]]
    assert [row[:4] for row in rows] == [
        ["abc", "laptop", "user", "valid"],
        ["soon", "laptop", "user", "valid"],
    ]
    rows = [line.split() for line in run("keys", "list", "--all").stdout.splitlines()[1:]]
    assert [(row[0], row[3]) for row in rows[2:]] == [("late", "expired"), ("gone", "revoked")]
    assert json.loads(run("keys", "list", "--all", "--json").stdout) == keys


def test_the_key_alone_is_printed_so_that_it_can_be_piped(peer: Peer) -> None:
    secret = "rsd_admin_abc_" + "x" * 43 + "_00000000"
    peer.answers("POST /v1/keys", KEY | {"role": "admin", "key": secret})
    result = run("keys", "create", "laptop", "--admin", "--days", "0.5")
    assert result.stdout == f"{secret}\n"
    assert "abc" in result.stderr
    assert peer.requests[0].json() == {"name": "laptop", "role": "admin", "expires_in_s": 43_200}
    run("keys", "create", "laptop")
    assert peer.requests[1].json() == {"name": "laptop", "role": "user"}


def test_revoke_names_the_key(peer: Peer) -> None:
    peer.answers("DELETE /v1/keys/abc", {"id": "abc", "object": "key", "deleted": True})
    assert run("keys", "revoke", "abc").stdout == "Revoked abc\n"
