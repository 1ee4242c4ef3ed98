"""The command line: the files that training left."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.cli_peer import Answer, Peer, error, run, serve

ROUTE = "GET /v1/fine_tuning/jobs/ftjob-1/artifacts"


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    with serve() as peer:
        monkeypatch.setenv("RESIDENCY_URL", peer.url)
        monkeypatch.setenv("RESIDENCY_API_KEY", "sk-test")
        yield peer


def artifact(name: str, kind: str = "adapter") -> dict[str, Any]:
    return {"id": name, "name": name, "bytes": 1234, "kind": kind, "created_at": 1700000000}


def offer(peer: Peer, *names: str) -> None:
    """A job with these files, each of which holds its own name."""
    peer.answers(ROUTE, {"data": [artifact(name) for name in names], "has_more": False})
    for name in names:
        peer.answers(f"{ROUTE}/{name.replace('/', '%2F')}", Answer(name.encode()))


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def test_artifacts_are_listed(peer: Peer) -> None:
    listed = [artifact("adapter_config.json"), artifact("logs/train.log", "log")]
    peer.answers(ROUTE, {"data": listed, "has_more": False})
    lines = run("jobs", "artifacts", "ftjob-1").stdout.splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["adapter_config.json", "adapter", "1.2", "kB"],
        ["logs/train.log", "log", "1.2", "kB"],
    ]
    assert json.loads(run("jobs", "artifacts", "ftjob-1", "--json").stdout) == listed
    peer.answers(ROUTE, {"data": [], "has_more": False})
    assert "No files yet" in run("jobs", "artifacts", "ftjob-1").stderr


def test_all_files_are_downloaded_into_their_folders(peer: Peer, tmp_path: Path) -> None:
    offer(peer, "adapter_config.json", "checkpoint-5/MANIFEST.json", "logs/train.log")
    result = run("jobs", "download", "ftjob-1", "--to", str(tmp_path / "new"))
    assert result.exit_code == 0, result.stderr
    assert files(tmp_path / "new") == {
        name: name for name in ("adapter_config.json", "checkpoint-5/MANIFEST.json", "logs/train.log")
    }
    assert result.stdout.splitlines()[0] == str(tmp_path / "new" / "adapter_config.json")


def test_files_and_folders_can_be_chosen(peer: Peer, tmp_path: Path) -> None:
    offer(peer, "a.json", "b.json", "checkpoint-5/a.json", "checkpoint-50/a.json")
    (tmp_path / "b.json").write_text("older")
    assert run("jobs", "download", "ftjob-1", "b.json", "checkpoint-5", "--to", str(tmp_path)).exit_code == 0
    assert files(tmp_path) == {"b.json": "b.json", "checkpoint-5/a.json": "checkpoint-5/a.json"}


def test_a_name_that_is_not_there(peer: Peer, tmp_path: Path) -> None:
    offer(peer, "a.json")
    result = run("jobs", "download", "ftjob-1", "a.json", "nope", "--to", str(tmp_path))
    assert (result.exit_code, files(tmp_path)) == (1, {})
    assert "'nope'" in result.stderr


@pytest.mark.parametrize("name", ["../out.json", "/out.json", "a/../../out.json", "..", "."])
def test_a_server_cannot_write_elsewhere(peer: Peer, tmp_path: Path, name: str) -> None:
    offer(peer, name)
    result = run("jobs", "download", "ftjob-1", "--to", str(tmp_path / "in"))
    assert result.exit_code == 1
    assert "outside" in result.stderr
    assert files(tmp_path) == {}


def test_what_breaks_off_leaves_nothing(peer: Peer, tmp_path: Path) -> None:
    offer(peer, "a.json")
    peer.answers(f"{ROUTE}/a.json", error(404, "No such artifact: a.json"))
    (tmp_path / "a.json").write_text("older")
    result = run("jobs", "download", "ftjob-1", "--to", str(tmp_path))
    assert (result.exit_code, result.stderr) == (1, "No such artifact: a.json\n")
    assert files(tmp_path) == {"a.json": "older"}


def test_a_folder_that_cannot_be_written(peer: Peer, tmp_path: Path) -> None:
    offer(peer, "a.json/b.json")
    (tmp_path / "a.json").write_text("in the way")
    result = run("jobs", "download", "ftjob-1", "--to", str(tmp_path))
    assert result.exit_code == 1
    assert "cannot be written: " in result.stderr
