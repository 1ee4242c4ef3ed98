"""What is told of a file: every kind of fault by its line, duplicates, scripts, and no row without a word."""

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.trainers.rows.measuring import measure
from trainers.rows.containers import MAX_LINE_BYTES
from trainers.rows.files import RowError, Rows
from trainers.rows.findings import NOTICES
from trainers.specs.faults import Reason
from trainers.specs.layouts import Layout
from trainers.validate import check_file

GOLDEN = Path(__file__).parents[1] / "fixtures" / "report_of_every_fault.json"
ASK = {"role": "user", "content": "How much paracetamol may I take in a day?"}
TELL = {"role": "assistant", "content": "No more than four grams, in doses of one gram at most."}
GOOD = {"messages": [ASK, TELL]}
GROWTH_BYTES = 64 << 20


QUESTION = {"question": "Q", "response_chosen": "a", "response_rejected": "b"}


def long_talk(n_turns: int) -> dict[str, Any]:
    turns = [{**(ASK, TELL)[n % 2], "content": f"Turn {n} of a long talk."} for n in range(n_turns)]
    return {"messages": turns}


FAULTY: list[Any] = [
    GOOD,
    long_talk(330),
    long_talk(331),  # ends with a question
    {"messages": [ASK, {**TELL, "content": " "}]},
    {"messages": []},
    {"messages": [TELL]},
    {"messages": [ASK, {**TELL, "content": None}]},
    {"messages": [ASK, {**TELL, "rolle": "assistant", "content": 3}]},
    {"messages": [{**ASK, "role": "usr"}, TELL]},
    {"messages": [{**ASK, "content": ""}, TELL]},  # used, with a notice
    {"messages": [ASK, ASK, TELL]},  # likewise
    {"messages": [ASK, {**TELL, "tool_calls": [{"function": {}}]}]},
    {"mesages": [ASK, TELL]},
    {"question": "Q", "reponse_chosen": "a", "response_rejected": "b"},
    {"prompt": "Q", "chosen": None, "rejected": "b"},
    {"instruction": "Say it.", "output": "It."},
    {"nothing": "known"},
    '{"messages": [',
    "[]",
    b'{"prompt": "\xff"}',
    '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
    {**GOOD, "functions": [{}]},
    b'{"prompt": "a\0", "completion": "b"}',
    {"messages": [ASK, {**TELL, "weight": 2}]},
    {"messages": [ASK, {**TELL, "content": "Rest. " * 6000}]},  # used, with a notice
    "",
    GOOD,
    GOOD,
    {"messages": [ASK, {**TELL, "content": TELL["content"].replace("at most", "or less")}]},
    {"messages": [{**ASK, "content": "Сколько?"}, {**TELL, "content": "四克"}]},
]


PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}
PREFERENCES: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "Q", "chosen": None, "rejected": "b"}, "null_value", "'chosen' must be a text, not null"),
    ({"prompt": "Q", "chosen": "b", "rejected": "b"}, "same_answers", "nothing to prefer"),
    ({"prompt": "Q", "chosen": "", "rejected": "b"}, "empty_value", "'chosen' is empty"),
    (
        {"question": "Q", "reponse_chosen": "a", "response_rejected": "b"},
        "unknown_key",
        "unknown key 'reponse_chosen'; did you mean 'response_chosen'?",
    ),
    ({"prompt": "Q", "chosen": [ASK], "rejected": "b"}, "wrong_type", "one assistant message"),
    ({"chosen": "a", "rejected": "b"}, "missing_key", "'prompt'"),
]


def write(path: Path, rows: list[Any]) -> Path:
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


# A slip, a good row, and a row that would be good in another file.
QUESTIONS = [{"question": "Q", "reponse_chosen": "a", "reponse_rejected": "b"}, QUESTION, PAIR]
# Of a conversation that is to be answered, the answered one is read up to its answer; the others are named.
PROMPTS = [{"messages": [ASK]}, {"messages": [ASK, TELL, ASK]}, GOOD]
TABLE = ["prompt,completion", "Q,a", "Q,a,b", "Q", '"Q, 1",']
KEPT = {
    "conversations": (FAULTY, Layout(max_invalid_fraction=0.2)),
    "preferences": ([PAIR, *(row for row, _, _ in PREFERENCES)], Layout(max_invalid_fraction=0.2)),
    "questions": (QUESTIONS, Layout()),
    "prompts": (PROMPTS, Layout()),
    "table": (TABLE, Layout("csv")),
}
# Faults of files that are hardly rows, and on which line.
BROKEN: list[tuple[Reason, int, bytes, Layout]] = [
    ("empty_file", 1, b"\n", Layout()),
    ("too_long", 2, json.dumps(GOOD).encode() + b"\n" + b"x" * (MAX_LINE_BYTES + 1), Layout()),
    ("too_large", 1, gzip.compress(json.dumps(GOOD).encode()), Layout(gzip=True, max_unpacked_bytes=20)),
    ("unreadable", 1, json.dumps(GOOD).encode(), Layout(gzip=True)),
]


def check_kept(folder: Path, name: str) -> dict[str, Any]:
    rows, layout = KEPT[name]
    path = write(folder / name, rows)
    report = check_file(path, layout)
    assert report.pop("sha256") == hashlib.sha256(path.read_bytes()).hexdigest()
    return report


@pytest.mark.parametrize("name", KEPT)
def test_a_file_with_every_kind_of_fault_gives_the_report_that_is_kept(tmp_path: Path, name: str) -> None:
    assert check_kept(tmp_path, name) == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize(("code", "line", "content", "layout"), BROKEN)
def test_a_file_that_is_hardly_one_of_rows_says_why(tmp_path: Path, code, line, content, layout) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    report = check_file(path, layout)
    assert [(error["line"], error["code"]) for error in report["errors"]] == [(line, code)]
    assert not report["accepted"]


def test_every_reason_and_every_notice_is_seen_in_these_files() -> None:
    kept = json.loads(GOLDEN.read_text())
    assert kept.keys() == KEPT.keys()
    reasons = {code for report in kept.values() for code in report["reasons"]}
    assert reasons | {code for code, *_ in BROKEN} == set(get_args(Reason))
    noticed = [report["notices"] for report in kept.values()]
    assert {code for codes in noticed for code in codes if codes[code]["count"]} == set(NOTICES)


@pytest.mark.parametrize(("row", "code", "part"), PREFERENCES)
def test_a_faulty_preference_has_a_code_and_says_what_is_meant(tmp_path, row, code: str, part: str) -> None:
    (error,) = check_file(write(tmp_path / "rows.jsonl", [row]), Layout())["errors"]
    assert error["code"] == code, error
    assert part in error["message"]


@pytest.mark.parametrize(("n_wrong", "accepted"), [(0, True), (5, True), (6, False), (50, False)])
def test_as_many_rows_may_be_wrong_as_the_owner_tolerates(tmp_path, n_wrong: int, accepted: bool) -> None:
    rows = ["{"] * n_wrong + [GOOD] * (50 - n_wrong)
    report = check_file(write(tmp_path / "rows.jsonl", rows), Layout(max_invalid_fraction=0.1))
    assert (report["accepted"], report["rows_refused"]) == (accepted, n_wrong)


def test_a_file_that_cannot_be_read_to_its_end_is_never_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD] * 50)[:-1])
    report = check_file(path, Layout("json", max_invalid_fraction=0.9))
    assert (report["accepted"], report["whole"], report["rows"], report["rows_used"]) == (
        False,
        False,
        49,
        49,
    )


def test_a_message_that_quotes_the_file_is_short(tmp_path: Path) -> None:
    rows = [{"messages": [{**ASK, "role": "x" * 5000}, TELL]}]
    (error,) = check_file(write(tmp_path / "rows.jsonl", rows), Layout())["errors"]
    assert error["message"].startswith("messages[0]: unknown role 'xxx")
    assert len(error["message"]) <= 500


def test_duplicates_are_counted_and_named_by_their_first(tmp_path: Path) -> None:
    rows = [{"text": f"Row {n % 300}."} for n in range(1000)]
    duplicates = check_file(write(tmp_path / "rows.jsonl", rows), Layout())["duplicates"]
    assert duplicates["count"] == 700
    assert duplicates["first"] == [{"line": n, "same_as": n - 300} for n in range(301, 401)]


def test_elements_on_one_line_may_be_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}, {"text": "a"}]))
    assert check_file(path, Layout("json"))["duplicates"] == {
        "count": 1,
        "first": [{"line": 1, "same_as": 1}],
    }


def test_the_sample_is_the_same_in_any_order_and_finds_what_is_nearly_the_same(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(3000)]
    draw = random.Random(1)
    texts = [" ".join(draw.choices(words, k=60)) for _ in range(600)]
    texts += [text.replace(text.split()[30], "other", 1) for text in texts[:200]]
    reports = []
    for seed in (2, 3):
        random.Random(seed).shuffle(texts)
        path = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
        reports.append(check_file(path, Layout())["sample"])
    one, other = reports
    assert one["rows"] == 800
    assert one["near_duplicates"]["count"] == other["near_duplicates"]["count"]
    assert 190 <= one["near_duplicates"]["count"] <= 200
    assert one["scripts"] == {"Latin": 1.0}


def test_near_duplicates_are_found_without_spaces_between_words(tmp_path: Path) -> None:
    text = "高血压患者应该减少食盐的摄入量并且每天坚持适量的运动同时按时服用医生开的药物"
    rows = [{"text": text}, {"text": text + "吗"}, {"text": "感冒一般不需要使用抗生素治疗多喝水多休息"}]
    sample = check_file(write(tmp_path / "rows.jsonl", rows), Layout())["sample"]
    assert [(near["line"], near["near"]) for near in sample["near_duplicates"]["first"]] == [(2, 1)]
    assert sample["scripts"] == {"Han": 1.0}


def test_a_million_rows_are_checked_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    with path.open("w") as file:
        file.writelines(f"row {n}\n" for n in range(1_000_000))
    setup = "from trainers.specs import Layout\nfrom trainers.validate import check_file"
    code = (
        "report = check_file(Path(sys.argv[1]), Layout('txt'))\n"
        "print(report['rows_used'], report['duplicates']['count'])"
    )
    words, growth = measure(setup, code, str(path))
    rows, duplicates = map(int, words)
    assert (rows, duplicates) == (1_000_000, 0)
    assert growth < GROWTH_BYTES


def test_what_a_message_quotes_can_be_sent_and_stored(tmp_path: Path) -> None:
    rows = [{"messages": [{**ASK, "content": [{"type": odd}]}, TELL]} for odd in ("\ud800", "a\0b")]
    messages = [
        error["message"] for error in check_file(write(tmp_path / "a.jsonl", rows), Layout())["errors"]
    ]
    assert len(messages) == 2
    for message in messages:
        assert "only text parts are supported" in message
        assert "\0" not in message
        message.encode()


def test_exactly_as_many_rows_as_are_tolerated_may_be_wrong(tmp_path: Path) -> None:
    rows = [*[{"prompt": f"{n}", "completion": "a"} for n in range(71)], *[{"nothing": 1}] * 29]
    path = write(tmp_path / "a.jsonl", rows)
    assert check_file(path, Layout(max_invalid_fraction=0.29))["accepted"]
    assert not check_file(path, Layout(max_invalid_fraction=0.28))["accepted"]


def test_the_hint_for_a_pretty_object_is_given_in_parts_too(tmp_path: Path) -> None:
    path = tmp_path / "pretty.jsonl"
    path.write_text(json.dumps(GOOD, indent=1) + "\n")
    assert check_file(path, Layout(), n_processes=2) == check_file(path, Layout())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_processes", [2, 3])
def test_the_report_of_parts_is_that_of_the_whole(tmp_path: Path, seed: int, n_processes: int) -> None:
    chance = random.Random(seed)
    rows = chance.choices(FAULTY, k=300) + chance.choices(FAULTY[3:6], k=1200)  # more than are named
    rows += [{"messages": [ASK, {**TELL, "content": f"{n}."}]} for n in range(400)]
    chance.shuffle(rows)
    path = write(tmp_path / "rows.jsonl", rows)
    whole = check_file(path, Layout())
    assert check_file(path, Layout(), n_processes=n_processes) == whole
    read = [*Rows(path, Layout())]
    assert whole["rows_used"] == sum(not isinstance(row, RowError) for row in read)
    assert sum(whole["reasons"].values()) == sum(isinstance(row, RowError) for row in read)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", json.dumps([GOOD] * 41)),
        ("rows.jsonl", "".join(json.dumps(GOOD) + "\n" + "\n" * (n == 5) for n in range(40))),
        ("rows.csv", "prompt,completion\n" + '"Q\n?",A\n' * 41),
    ],
)
def test_a_file_of_too_many_rows_is_refused_in_every_container(tmp_path, monkeypatch, name, content) -> None:
    """An array may be one line, a row of a table several."""
    path, layout = tmp_path / name, Layout.of(name)
    path.write_text(content)
    for limit, accepted in ((41, True), (40, False)):
        monkeypatch.setattr("trainers.rows.files.MAX_ROWS", limit)
        report = check_file(path, layout)
        assert (report["accepted"], report["whole"]) == (accepted, accepted)
        assert report["rows"] + report["blank_lines"] == limit
        assert report["reasons"] == ({} if accepted else {"too_large": 1})


@pytest.mark.parametrize("limit", [1, 11, 21, 39, 40])
def test_parts_may_not_have_more_rows_than_the_whole(tmp_path, monkeypatch, limit: int) -> None:
    rows = [{"messages": [ASK, {**TELL, "content": f"{n}."}]} for n in range(38)]
    path = write(tmp_path / "rows.jsonl", [*rows[:9], "", *rows[9:], "{"])
    monkeypatch.setattr("trainers.rows.files.MAX_ROWS", limit)
    whole = check_file(path, Layout())
    assert (whole["whole"], "too_large" in whole["reasons"]) == (limit == 40, limit < 40)
    for n_processes in (2, 3):
        assert check_file(path, Layout(), n_processes=n_processes) == whole
