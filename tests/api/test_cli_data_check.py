"""`residency data check`: the report of a file, made here."""

import json
from pathlib import Path

import pytest

from tests.api.cli_peer import run
from tests.parquet import write_crashing

GOOD = '{"prompt": "Is it a fever?", "completion": "Yes, it is."}\n'


def test_a_good_file_is_told_in_a_few_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD * 2)
    result = run("data", "check", str(path))
    assert result.exit_code == 0, result.stderr
    shown = [line.strip().split(maxsplit=1) for line in result.stdout.splitlines()]
    assert ["rows", "2: 2 used, 0 refused"] in shown
    assert ["format", "prompt_completion (conversation rows)"] in shown
    assert ["duplicates", "1: lines 2 as 1"] in shown
    assert ["scripts", "Latin 100.0%"] in shown


def test_every_notice_is_told_by_its_lines(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "Flu?"}, {"role": "assistant", "content": "Yes."}
    silent = {"role": "user", "content": ""}
    rows = [[user], [user, answer, silent], [*[user, answer] * 60, user], [user, user], [user, answer]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    result = run("data", "check", str(path))
    assert result.exit_code == 0, result.stderr
    for name, lines in (
        ("turns that say nothing", "1: lines 2"),
        ("roles out of order", "1: lines 4"),
        ("over-long rows", "1: lines 3"),
        ("unanswered among answered", "4: lines 1, 2, 3, 4"),
    ):
        assert f"{name} {lines}" in " ".join(result.stdout.split())


def test_refused_rows_are_listed_and_the_exit_status_is_1(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + '{"promt": "a"}\n' + '{"prompt\\u001b[31m": 1}\n' + "{\n")
    result = run("data", "check", str(path))
    assert result.exit_code == 1
    assert "4: 1 used, 3 refused" in result.stdout
    assert "unknown key 'promt'; did you mean 'prompt'?" in " ".join(result.stdout.split())
    assert "\x1b" not in result.stdout


def test_a_file_that_its_reader_crashes_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(write_crashing())
    result = run("data", "check", str(path))
    assert (result.exit_code, result.stderr) == (1, "")
    assert "its reader crashed on it" in " ".join(result.stdout.split())
    assert "The file could not be read to its end." in result.stdout


def test_the_raw_report_can_be_had_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a folder that has a package of the same name."""
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("Frage,Antwort\nQ,A\nQ,\n")
    columns = ("--column", "prompt=Frage", "--column", "completion=Antwort")
    result = run("data", "check", "rows.csv", "--json", "--format", "prompt_completion", *columns)
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["rows_used"], report["reasons"]) == (1, {"empty_value": 1})


def test_so_many_rows_may_be_wrong(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD * 3 + "{\n")
    strict = run("data", "check", str(path), "--max-invalid-fraction", "0.2")
    assert (strict.exit_code, "4: 3 used, 1 refused" in strict.stdout) == (1, True)
    tolerant = run("data", "check", str(path), "--max-invalid-fraction", "0.25", "--json")
    assert tolerant.exit_code == 0
    report = json.loads(tolerant.stdout)
    assert (report["accepted"], report["max_invalid_fraction"], report["rows_used"]) == (True, 0.25, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        ("rows.pdf", [], ".jsonl, .json, .csv"),
        ("rows.csv", ["--format", "alpacca"], "did you mean 'alpaca'"),
        ("rows.csv", ["--column", "prompt"], "is not KEY=COLUMN"),
        ("rows.csv", ["--max-invalid-fraction", "1"], "from 0 up to 1"),
        ("rows.csv", ["--max-invalid-fraction", "nan"], "from 0 up to 1"),
    ],
)
def test_what_cannot_be_checked_says_why(tmp_path: Path, name: str, arguments: list[str], part: str) -> None:
    path = tmp_path / name
    path.write_text(GOOD)
    result = run("data", "check", str(path), *arguments)
    assert result.exit_code == 1
    assert part in result.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--method", "dpo"], "need a --model"),
        (["--max-length", "64"], "need a --model"),
        (["--model", "org/m"], "no model folder"),
    ],
)
def test_tokens_need_a_model_of_this_machine(tmp_path: Path, arguments: list[str], part: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)
    result = run("data", "check", str(path), *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert part in result.stderr


@pytest.mark.long
def test_tokens_are_counted_by_a_model(tiny_model: Path, tmp_path: Path) -> None:
    """That they are those of the server is shown in tests/contracts."""
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + json.dumps({"prompt": "Is it?", "completion": "Yes. " * 90}) + "\n")
    arguments = ["data", "check", str(path), "--model", str(tiny_model), "--max-length", "64"]
    told = run(*arguments)
    assert told.exit_code == 0, told.stderr
    shown = [" ".join(line.split()) for line in told.stdout.splitlines()]
    assert "cut 1 (50.0%)" in shown
    assert "up to 64 1" in shown
    tokens = json.loads(run(*arguments, "--json").stdout)["tokens"]
    assert (tokens["examples"], tokens["truncated"], tokens["method"]) == (2, 1, "supervised")
    assert f"tokens {tokens['tokens']} of 2 examples" in shown
    refused = run(*arguments, "--method", "telepathy")
    assert refused.exit_code == 1
    assert "telepathy" in refused.stderr
