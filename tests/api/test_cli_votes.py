"""The command line: votes between two answers."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.cli_peer import Peer, run, serve

VOTE: dict[str, Any] = {
    "id": "vote-1",
    "object": "vote",
    "created_at": 1700000000,
    "prompt": [{"role": "system", "content": "Short."}, {"role": "user", "content": "Is it\n a fever?"}],
    "chosen": {"model": "ft:m", "content": "Yes."},
    "rejected": {"model": "m", "content": "No."},
}
FILE: dict[str, Any] = {"id": "file-1", "filename": "votes.jsonl", "bytes": 120, "status_details": None}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    with serve() as peer:
        monkeypatch.setenv("RESIDENCY_URL", peer.url)
        monkeypatch.setenv("RESIDENCY_API_KEY", "sk-test")
        monkeypatch.setattr("api.client.POLL_EVERY_S", 0.001)
        yield peer


def test_list_names_the_question_and_the_models(peer: Peer) -> None:
    peer.answers("GET /v1/votes", {"object": "list", "data": [VOTE], "has_more": False})
    (row,) = run("votes", "list").stdout.splitlines()[1:]
    assert row.split()[0] == "vote-1"
    assert "Is it a fever?" in row
    assert row.split()[-2:] == ["ft:m", "m"]
    assert json.loads(run("votes", "list", "--json").stdout) == [VOTE]


def test_export_waits_for_the_check(peer: Peer) -> None:
    waiting, checked = FILE | {"status": "uploaded"}, FILE | {"status": "processed", "rows": 3}
    peer.answers("POST /v1/votes/export", waiting)
    peer.answers("GET /v1/files/file-1", waiting, checked)
    assert run("votes", "export").stdout == "file-1  votes.jsonl  120 B  3 rows\n"
    refused = FILE | {"status": "error", "status_details": "Line 1: no"}
    peer.answers("GET /v1/files/file-1", refused)
    result = run("votes", "export")
    assert (result.exit_code, "file-1: Line 1: no" in result.stderr) == (1, True)
