"""Training files as users write them: what is read, what is refused, and on which line."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from tests.trainers.rows.measuring import run_limited
from trainers.rows.containers import MAX_LINE_BYTES
from trainers.rows.files import RowError, Rows
from trainers.rows.formats import AnyRow, Row
from trainers.specs.layouts import Layout
from trainers.validate import check_file

USER = {"role": "user", "content": "Is it a fever?"}
ANSWER = {"role": "assistant", "content": "Yes."}
GOOD = {"messages": [USER, ANSWER]}
JSONL = Layout()
MEMORY_BYTES = 128 << 20


def first(path: Path) -> AnyRow | RowError:
    return next(iter(Rows(path, JSONL)))


@pytest.mark.parametrize(
    ("row", "kind", "user", "answer"),
    [
        (GOOD, "messages", "Is it a fever?", "Yes."),
        ({"instruction": "Sum", "input": "1 2", "output": "3"}, "alpaca", "Sum\n1 2", "3"),
        ({"instruction": "Sum", "output": "3", "id": 7}, "alpaca", "Sum", "3"),
        ({"prompt": "Hi", "completion": " there"}, "prompt_completion", "Hi", " there"),
    ],
)
def test_each_format_becomes_a_conversation(write_jsonl, row, kind, user, answer) -> None:
    rows = Rows(write_jsonl([row]), JSONL)
    (read,) = list(rows)
    assert rows.format == kind
    assert [message["content"] for message in read.messages] == [user, answer]


def test_parts_roles_and_weights_are_kept(write_jsonl) -> None:
    parts = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "flu?"}]
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
            {**ANSWER, "weight": 0},
            USER,
            {**ANSWER, "weight": 1},
        ]
    }
    read = first(write_jsonl([row]))
    assert isinstance(read, Row)
    assert [m["role"] for m in read.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert read.messages[1]["content"] == "Is it flu?"
    assert [m.get("weight") for m in read.messages if m["role"] == "assistant"] == [0, 1]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"message": [USER, ANSWER]}, "did you mean 'messages'"),
        ({"messages": [{"Role": "user", "content": "a"}, ANSWER]}, "did you mean 'role'"),
        ({"messages": [USER, {"role": "asistant", "content": "b"}]}, "did you mean 'assistant'"),
        ({"messages": [USER, {**ANSWER, "wieght": 1}]}, "did you mean 'weight'"),
        ({"messages": [{"from": "human", "value": "a"}]}, "did you mean 'role'"),
        ({"instruction": "a", "inputs": "lost", "output": "b"}, "did you mean 'input'"),
        ({"messages": [ANSWER]}, "no user message before"),
        ({"messages": [USER, {**ANSWER, "function_call": {"name": "f"}}]}, "write tool_calls"),
        ({**GOOD, "functions": [{}]}, "write tools"),
        ({"instruction": "a", "output": "b", "tools": [{}]}, "not supported here"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "weight must be 0 or 1"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "weight must be 0 or 1"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "only assistant messages"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "not null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "only text parts"),
        ({"messages": []}, "at least one"),
        ({"completion": "a"}, "'prompt' is missing"),
        ({"chosen": "a", "rejected": "b"}, "'prompt'"),
        ({"x": 1}, "unknown row"),
        ([GOOD], "array"),
        ('{"messages": [', "not JSON"),
        ('{"prompt": "\\ud800", "completion": "b"}', "surrogate"),
        ("[" * 100_000, "not JSON"),
        (b'{"prompt": "a\x00", "completion": "b"}', "NUL"),
        (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}', "byte order mark"),
        ("prompt".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(write_jsonl, row, part) -> None:
    read = first(write_jsonl([row]))
    assert isinstance(read, RowError), "was accepted"
    assert part in read.message
    assert read.line == 1


@pytest.mark.parametrize(
    ("messages", "part"),
    [([USER], "no assistant message"), ([USER, ANSWER, USER], "last message must be the assistant's")],
)
def test_a_conversation_among_others_must_end_with_an_answer(write_jsonl, messages, part) -> None:
    """Alone it would be a prompt."""
    _, read = list(Rows(write_jsonl([GOOD, {"messages": messages}]), JSONL))
    assert isinstance(read, RowError)
    assert part in read.message


def test_errors_carry_their_line_and_blank_lines_count_as_lines(write_jsonl) -> None:
    report = check_file(
        write_jsonl([GOOD, "", "  ", '{"broken', GOOD, {"prompt": "a", "completion": "b"}]), JSONL
    )
    assert [error["line"] for error in report["errors"]] == [4, 6]
    assert (report["rows"], report["blank_lines"], report["rows_refused"]) == (4, 2, 2)


def test_a_mistaken_first_row_does_not_decide_the_format(write_jsonl) -> None:
    report = check_file(write_jsonl([{"instruction": "a"}, GOOD, GOOD]), JSONL)
    assert report["format"] == "messages"
    assert [error["line"] for error in report["errors"]] == [1]


@pytest.mark.parametrize(("rows", "part"), [([], "empty"), (["", ""], "no rows")])
def test_a_file_without_rows_is_an_error(write_jsonl, rows, part) -> None:
    report = check_file(write_jsonl(rows), JSONL)
    assert part in report["errors"][0]["message"]


def test_the_report_holds_the_first_hundred_errors_of_a_reason_and_counts_all(write_jsonl) -> None:
    report = check_file(write_jsonl(["{"] * 250), JSONL)
    assert (len(report["errors"]), report["reasons"]) == (100, {"not_json": 250})


def test_a_line_too_long_is_skipped_and_the_next_is_read(write_jsonl) -> None:
    report = check_file(write_jsonl(["x" * (MAX_LINE_BYTES + 5), GOOD]), JSONL)
    assert (report["rows_refused"], report["errors"][0]["line"], report["format"]) == (1, 1, "messages")


LONG = b"y" * 200_000_000
ROW = json.dumps(GOOD).encode()
TOO_LONG: dict[str, tuple[bytes, int, bool]] = {  # content, rows that are told of, whether all are
    "jsonl": (LONG + b"\n" + ROW + b"\n", 2, True),
    "json": (b"[" + ROW + b', {"text": "' + LONG + b'"}]', 1, False),
    "csv": (b"prompt,completion\nQ,A\nQ," + LONG + b"\n", 1, False),
    "txt": (LONG + b"\nA line.\n", 2, True),
}


@pytest.mark.parametrize("container", TOO_LONG)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_line_of_200_mb_is_reported_in_bounded_memory(tmp_path: Path, container: str, ending: str) -> None:
    content, n_rows, is_whole = TOO_LONG[container]
    path, report_path = tmp_path / f"rows.{container}{ending}", tmp_path / "report.json"
    path.write_bytes(gzip.compress(content, 1) if ending else content)
    argv = [sys.executable, "-m", "trainers.validate", str(path), f"--report={report_path}"]
    done = run_limited(argv, data_bytes=MEMORY_BYTES)
    assert done.returncode == 0, done.stderr
    report = json.loads(report_path.read_text())
    assert (report["rows"], report["rows_used"], report["whole"]) == (n_rows, 1, is_whole)
    assert report["reasons"] == {"too_long": 1}
