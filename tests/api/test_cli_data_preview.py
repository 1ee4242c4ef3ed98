"""The command line: what a model will see in a file, with a server and without one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from api.commands import data_preview
from tests.api.cli_peer import Peer, error, run, serve
from tests.api.test_previews import ROW, ROWS
from tests.tiny import chat_rows

ROUTE = "GET /v1/files/file-1/preview"
PENDING = error(503, "A worker is looking at the file; ask again.", code="preview_pending")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    with serve() as peer:
        monkeypatch.setenv("RESIDENCY_URL", peer.url)
        monkeypatch.setenv("RESIDENCY_API_KEY", "sk-test")
        yield peer


def ask(*arguments: str) -> Any:
    return run("data", "preview", "file-1", "--model", "org/m", *arguments)


def test_what_is_trained_is_told_apart_without_colours(peer: Peer) -> None:
    peer.answers(ROUTE, ROWS)
    result = ask()
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[:2] == ["Row 1 (line 1): 2 tokens, 1 trained", "Hi⟦🤒⟧"]


def test_and_with_colours(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    peer.answers(ROUTE, ROWS)
    console = Console(force_terminal=True, color_system="standard", markup=False, record=True)
    monkeypatch.setattr(data_preview, "out", console)
    ask()
    assert "Hi\x1b[1;32m⟦🤒⟧\x1b[0m" in console.export_text(styles=True)


def test_the_question_is_the_servers(peer: Peer) -> None:
    peer.answers(ROUTE, ROWS)
    options = "--method supervised --row 3 --row 5 --max-length 64 --train-on-inputs --template qwen".split()
    assert ask(*options).exit_code == 0
    query = (
        "model=org%2Fm&method=supervised&row=3&row=5&max_length=64&train_on_inputs=true&chat_template=qwen"
    )
    assert peer.requests[0].path.partition("?")[2] == query


def test_an_answer_that_is_not_there_yet_is_waited_for(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("api.commands.data_preview.time.sleep", waited.append)
    PENDING.headers["retry-after"] = "2"
    peer.answers(ROUTE, PENDING, PENDING, ROWS)
    assert json.loads(ask("--json").stdout) == ROWS
    assert waited == [2.0, 2.0]


def test_a_refusal_is_told(peer: Peer) -> None:
    peer.answers(ROUTE, error(400, "row 9: the file has 4 rows", param="row"))
    result = ask("--row", "9")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the file has 4 rows" in result.stderr


def test_rows_that_are_left_out_cut_or_pairs(peer: Peer) -> None:
    (text,) = ROW["texts"]
    refused = {"row": 2, "line": 3, "used": False, "error": "not \x1b[31mJSON", "texts": []}
    pair = {
        "row": 3,
        "truncated": True,
        "full_tokens": 9,
        "texts": [text | {"name": "chosen"}, text | {"name": "rejected", "tokens_left_out": 7}],
    }
    answer = ROWS | {"notes": ["new_tokens: not yet"], "rows": [ROW | refused, ROW | pair]}
    peer.answers(ROUTE, answer)
    result = ask()
    assert "new_tokens" in result.stderr
    assert result.stdout.splitlines() == [
        "Row 2 (line 3)",
        "Left out: not [31mJSON",
        "",
        "Row 3 (line 1): 2 tokens, 1 trained, cut from 9",
        "-- chosen",
        "Hi⟦🤒⟧",
        "-- rejected",
        "Hi⟦🤒⟧",
        "… and 7 more tokens",
        "",
    ]


def test_every_token_can_be_listed(peer: Peer) -> None:
    peer.answers(ROUTE, ROWS)
    lines = ask("--tokens").stdout.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["ID", "TEXT", "BYTES", "TRAINED"],
        ["5", '"Hi"'],
        ["6", '"🤒"', "f0", "9f", "a4", "92", "yes"],
    ]


def test_a_file_of_this_machine_needs_a_model_of_it(peer: Peer, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("{}")
    result = run("data", "preview", str(path), "--model", "org/m")
    assert result.exit_code == 1
    assert "upload the file" in result.stderr
    assert peer.requests == []


@pytest.mark.parametrize("said", [("--format", "alpaca"), ("--column", "prompt=Frage")])
def test_how_an_uploaded_file_is_read_was_said_with_it(peer: Peer, said: tuple[str, str]) -> None:
    result = ask(*said)
    assert result.exit_code == 1
    assert "when it was uploaded" in result.stderr
    assert peer.requests == []


def test_a_file_of_this_machine_is_read_as_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("Frage\n")
    result = run("data", "preview", str(path), "--model", str(tmp_path), "--format", "alpacca")
    assert result.exit_code == 1
    assert "did you mean 'alpaca'" in result.stderr


@pytest.mark.long
def test_a_file_and_a_model_of_this_machine_need_no_server(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESIDENCY_URL", "http://127.0.0.1:9")
    rows = chat_rows(2)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = ["data", "preview", str(path), "--model", str(tiny_model), "--max-length", "128"]
    result = run(*local, "--row", "2")
    assert result.exit_code == 0, result.stderr
    assert f"⟦{rows[1]['messages'][1]['content']}<|im_end|>⟧" in result.stdout
    table = tmp_path / "rows.csv"
    table.write_text("Frage,Antwort\nA fever?,Rest and drink.\n")
    columns = ["--column", "prompt=Frage", "--column", "completion=Antwort"]
    told = run("data", "preview", str(table), *local[3:], "--format", "prompt_completion", *columns)
    assert told.exit_code == 0, told.stderr
    assert "⟦Rest and drink." in told.stdout
    refused = run(*local, "--row", "3")
    assert refused.exit_code == 1
    assert "the file has 2 rows" in refused.stderr
