"""Every format that rows are written in, what it becomes, and what is wrong with those that come near."""

import json
from pathlib import Path

import pytest

from trainers.rows.files import RowError, Rows
from trainers.rows.formats import FORMATS, Document, Pair, Row
from trainers.specs.layouts import Layout
from trainers.validate import check_file

CHAT = [{"role": "user", "content": "Q"}]
TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
SYSTEM = {"role": "system", "content": "S"}
PAIR = {"question": "Q", "response_chosen": "A", "response_rejected": "B"}


def read(write_jsonl, row) -> tuple[Row | Pair | Document | RowError, Rows]:
    rows = Rows(write_jsonl([row]), Layout())
    (only,) = list(rows)
    return only, rows


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"conversations": TURNS}, "sharegpt", [*CHAT, {"role": "assistant", "content": "A"}]),
        (
            {"conversations": TURNS, "system": "S"},
            "sharegpt",
            [SYSTEM, *CHAT, {"role": "assistant", "content": "A"}],
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, *TURNS], "tools": ""},
            "sharegpt",
            [SYSTEM, *CHAT, {"role": "assistant", "content": "A"}],
        ),
        (
            {"instruction": "Q", "output": "A", "system": "S"},
            "alpaca",
            [SYSTEM, *CHAT, {"role": "assistant", "content": "A"}],
        ),
    ],
)
def test_conversations(write_jsonl, row, name, messages) -> None:
    got, rows = read(write_jsonl, row)
    assert got == Row(1, messages)
    assert (rows.format, rows.kind) == (name, "conversation")


@pytest.mark.parametrize(
    ("row", "name", "prompt"),
    [
        (PAIR, "question_preference", CHAT),
        ({**PAIR, "system": "", "history": []}, "question_preference", CHAT),
        (
            {**PAIR, "system": "S", "history": [["q", "a"]]},
            "question_preference",
            [SYSTEM, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, *CHAT],
        ),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference", CHAT),
        (
            {
                "prompt": CHAT,
                "chosen": [{"role": "assistant", "content": "A"}],
                "rejected": [{"role": "assistant", "content": "B"}],
            },
            "preference",
            CHAT,
        ),
        (
            {"conversations": TURNS[:1], "system_prompt": "S", "chosen": "A", "rejected": "B"},
            "preference",
            [SYSTEM, *CHAT],
        ),
        (
            {
                "input": {"messages": CHAT, "tools": []},
                "preferred_output": [{"role": "assistant", "content": "A"}],
                "non_preferred_output": [{"role": "assistant", "content": "B"}],
            },
            "openai_preference",
            CHAT,
        ),
    ],
)
def test_preferences(write_jsonl, row, name, prompt) -> None:
    got, rows = read(write_jsonl, row)
    assert got == Pair(
        1, prompt, {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}
    )
    assert (rows.format, rows.kind) == (name, "preference")


def test_documents(write_jsonl) -> None:
    got, rows = read(write_jsonl, {"text": " two\nlines ", "meta": {"url": 1}})
    assert got == Document(1, " two\nlines ")
    assert (rows.format, rows.kind) == ("text", "document")


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (
            {"question": "Q", "reponse_chosen": "A", "response_rejected": "B"},
            "did you mean 'response_chosen'?",
        ),
        ({**PAIR, "response_chosen": None}, "'response_chosen' must be a text, not null"),
        ({**PAIR, "response_rejected": "A"}, "the same"),
        ({**PAIR, "response_rejected": " "}, "empty"),
        ({**PAIR, "history": [["only a question"]]}, "history[0] must be a question and its answer"),
        ({**PAIR, "history": "none"}, "'history' must be a list, not a text"),
        ({"chosen": "A", "rejected": "B"}, "'prompt' is missing"),
        ({"prompt": [{"role": "assistant", "content": "A"}], "chosen": "A", "rejected": "B"}, "the user's"),
        ({"conversations": TURNS, "chosen": "A", "rejected": "B"}, "the last message must be the user's"),
        ({"prompt": "Q", "chosen": CHAT, "rejected": "B"}, "'chosen' must be one assistant message"),
        ({"input": "Q", "preferred_output": [], "non_preferred_output": []}, "an object with 'messages'"),
        ({"conversations": TURNS[:1]}, "no assistant message"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]: 'value' is missing"),
        ({"conversations": [{"from": "human", "valu": "Q"}]}, "is it 'valu'?"),
        ({"conversations": [{"from": "me", "value": "x"}]}, "unknown speaker 'me'"),
        ({"text": ""}, "'text' is empty"),
        ({"texts": "x"}, "did you mean 'text'?"),
    ],
)
def test_what_comes_near_is_told_apart(write_jsonl, row, part) -> None:
    got, _ = read(write_jsonl, row)
    assert isinstance(got, RowError), "was accepted"
    assert part in got.message


SLIPS = [
    ({"question": "Q", "reponse_chosen": "A", "reponse_rejected": "B"}, PAIR, "response_chosen"),
    ({"prompt": "Q", "completon": "A"}, {"prompt": "Q", "completion": "A"}, "completion"),
    (
        {"prompt": "Q", "choosen": "A", "rejeted": "B"},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        "chosen",
    ),
    (
        {"prompt": "Q", "completion": "A", "lable": True},
        {"prompt": "Q", "completion": "A", "label": True},
        "label",
    ),
    (
        {"conversations": TURNS[:1], "choosen": "A", "rejeted": "B"},
        {"conversations": TURNS[:1], "chosen": "A", "rejected": "B"},
        "chosen",
    ),
]


@pytest.mark.parametrize(("slip", "good", "meant"), SLIPS)
def test_a_slip_is_no_row_of_a_format_with_fewer_keys(write_jsonl, slip, good, meant) -> None:
    for rows, n_good in ([slip], 0), ([slip, *[good] * 9], 9), ([*[good] * 9, slip], 9):
        report = check_file(write_jsonl(rows), Layout())
        (error,) = report["errors"]
        assert (error["line"], error["code"]) == (rows.index(slip) + 1, "unknown_key")
        assert error["message"].endswith(f"did you mean {meant!r}?")
        assert (report["rows_used"], report["accepted"]) == (n_good, False)


@pytest.mark.parametrize(
    ("slip", "good", "meant"),
    [
        (
            {"mesages": CHAT, "text": "A"},
            {"messages": [*CHAT, {"role": "assistant", "content": "A"}]},
            "messages",
        ),
        (
            {"prompt": "Q", "completion": "A", "lable": "yes"},
            {"prompt": "Q", "completion": "A", "label": True},
            "label",
        ),
    ],
)
def test_a_slip_among_rows_of_another_format_is_no_mixture(write_jsonl, slip, good, meant) -> None:
    (error,) = check_file(write_jsonl([good, slip]), Layout())["errors"]
    assert (error["line"], error["code"]) == (2, "unknown_key")
    assert error["message"].endswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "Q", "answer": "A", "labels": ["x"], "text": "T"}, "prompt"),
        ({"question": "Q", "reference_answer": "A", "prompt_id": 1}, "question"),
        ({"prompt": "Q", "completion": "A", "labels": [1, 2]}, "prompt_completion"),
        ({"prompt": "Q", "system": "S", "outputs": ["A"]}, "prompt"),
    ],
)
def test_columns_that_a_row_carries_along_are_no_slips(write_jsonl, row, name) -> None:
    got, rows = read(write_jsonl, row)
    assert not isinstance(got, RowError), got.message
    assert rows.format == name


ANSWERED = {"messages": [*CHAT, {"role": "assistant", "content": "A"}]}
OPEN = {"messages": [*ANSWERED["messages"], *CHAT]}


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize("places", [[0], [4], [0, 1, 5]])
def test_an_odd_last_turn_is_reported_wherever_it_is(
    write_jsonl, places: list[int], n_processes: int
) -> None:
    rows = [OPEN if n in places else ANSWERED for n in range(10)]
    report = check_file(write_jsonl(rows), Layout(), n_processes=n_processes)
    assert [(error["line"], error["code"]) for error in report["errors"]] == [
        (place + 1, "odd_last_turn") for place in places
    ]
    assert (report["format"], report["rows_used"]) == ("messages", 10 - len(places))
    assert report["notices"]["odd_last_turn"] == {"count": 0, "lines": []}


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize("answered", [[9], [1, 2], [150], [*range(100, 400)]])
def test_questions_among_which_some_are_answered_are_named(
    write_jsonl, answered: list[int], n_processes: int
) -> None:
    rows = [ANSWERED if n in answered else {"messages": CHAT} for n in range(400)]
    report = check_file(write_jsonl(rows), Layout(), n_processes=n_processes)
    lines = [n + 1 for n in range(400) if n not in answered]
    assert (report["format"], report["kind"], report["rows_used"]) == ("prompt_messages", "prompt", 400)
    assert report["notices"]["odd_last_turn"] == {"count": len(lines), "lines": lines[:100]}


def test_a_file_of_questions_alone_has_no_odd_one(write_jsonl) -> None:
    report = check_file(write_jsonl([{"messages": CHAT}] * 9), Layout())
    assert (report["format"], report["accepted"]) == ("prompt_messages", True)
    assert report["notices"]["odd_last_turn"] == {"count": 0, "lines": []}


def test_what_a_file_is_said_to_hold_is_not_guessed_from_most_rows(write_jsonl) -> None:
    report = check_file(write_jsonl([OPEN, *[ANSWERED] * 9]), Layout(format="prompt_messages"))
    assert (report["kind"], report["rows_used"]) == ("prompt", 10)


def test_a_faulty_question_decides_nothing(write_jsonl) -> None:
    faulty = {"messages": [*CHAT, {"role": "user", "content": 1}]}
    rows = [faulty, {"instruction": "Q", "output": "A"}, *[ANSWERED] * 3]
    assert check_file(write_jsonl(rows), Layout())["format"] == "alpaca"


def test_a_conversation_without_its_answer_is_a_fault_among_conversations(write_jsonl) -> None:
    rows = list(
        Rows(
            write_jsonl([{"messages": [*CHAT, {"role": "assistant", "content": "A"}]}, {"messages": CHAT}]),
            Layout(),
        )
    )
    assert isinstance(rows[1], RowError)
    assert "no assistant message" in rows[1].message


def test_formats_do_not_mix(write_jsonl) -> None:
    rows = list(Rows(write_jsonl([PAIR, {"prompt": "Q", "chosen": "A", "rejected": "B"}]), Layout()))
    assert isinstance(rows[1], RowError)
    assert "the rows before it are" in rows[1].message


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_tells_its_own_rows(name: str) -> None:
    """No earlier format takes a row that has just the keys of a later one."""
    row = {"messages": CHAT} if name == "prompt_messages" else dict.fromkeys(FORMATS[name].required, "x")
    row |= {"label": True} if name == "labelled" else {}
    earlier = list(FORMATS)[: list(FORMATS).index(name)]
    assert FORMATS[name].matches(row)
    assert not any(FORMATS[other].matches(row) for other in earlier)


def test_real_rows_are_read(tmp_path: Path) -> None:
    """Rows as data sets of the reference's pipeline have them, line ends and spare keys included."""
    lines = [
        json.dumps(
            {"instruction": "为给定的句子生成一个同义句。", "input": "", "output": "好的。"},
            ensure_ascii=False,
        ),
        json.dumps({"instruction": "Sum", "input": "1 2", "output": "3", "source": "x", "id": 7}),
    ]
    path = tmp_path / "rows"
    path.write_bytes("\r\n".join(lines).encode())
    assert [type(row) for row in Rows(path, Layout())] == [Row, Row]
