"""Rows that are trained on and evaluated too: reported, and refused where they are many."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import chat_rows
from tests.trainers.test_reward import pairs
from trainers.folders.events import Events
from trainers.folders.exits import DataError
from trainers.prepare import prepare
from trainers.specs import parse_method

DOCUMENTS = [{"text": f"Case {n}: {n % 7} tablets were taken."} for n in range(20)]
DEFAULT = parse_method(None, {}).hyperparameters.max_validation_overlap
ROWS: dict[str, list[dict]] = {"supervised": chat_rows(20), "pretraining": DOCUMENTS, "dpo": pairs(20)}


def prepared(run_dir: Path) -> dict[str, Any]:
    return prepare(run_dir, events=Events(run_dir / "events.jsonl"))


@pytest.mark.parametrize("method", ROWS)
def test_rows_on_both_sides_are_counted_with_their_lines(make_run, events_of, method: str) -> None:
    rows = ROWS[method]
    known = [rows[3] | {"source": "elsewhere"}, rows[5]]  # another column makes it no other row
    valid = [rows[16], *known, *rows[17:20]]
    run_dir = make_run(method=method, rows=rows[:16], valid_rows=valid)
    prepared(run_dir)
    (told,) = [e for e in events_of(run_dir, "message") if e["data"].get("code") == "validation_overlap"]
    assert told["level"] == "warn"
    assert told["data"] | {"code": ""} == {"code": "", "rows": 2, "of": 6, "lines": [2, 3]}


@pytest.mark.parametrize("method", ROWS)
def test_a_validation_file_that_is_trained_on_is_refused_unless_it_is_wanted(make_run, method: str) -> None:
    settings = {"method": method, "rows": ROWS[method], "valid_rows": ROWS[method]}
    with pytest.raises(DataError, match=r"20 of 20 validation rows .* max_validation_overlap 1 "):
        prepared(make_run("1", max_validation_overlap=DEFAULT, **settings))
    # Also when both files are in the cache.
    with pytest.raises(DataError, match="20 of 20"):
        prepared(make_run("2", max_validation_overlap=DEFAULT, **settings))
    assert prepared(make_run("3", max_validation_overlap=1, **settings))


def test_the_limit_is_the_share_that_is_allowed(make_run) -> None:
    rows = chat_rows(20)
    half = {"rows": rows[:16], "valid_rows": [*rows[12:16], *rows[16:20]]}
    assert prepared(make_run("1", max_validation_overlap=0.5, **half))
    with pytest.raises(DataError, match="4 of 8"):
        prepared(make_run("2", max_validation_overlap=0.49, **half))


def test_a_prompt_is_the_same_whatever_its_answer_was(make_ppo_run, events_of) -> None:
    train = [{"prompt": f"Question {n}", "completion": "Yes."} for n in range(6)]
    valid = [{"prompt": "Question 1", "completion": "No."}, {"prompt": "Question 9", "completion": "No."}]
    run_dir = make_ppo_run(rows=train, valid_rows=valid, n_valid=2, max_validation_overlap=1)
    prepared(run_dir)
    (told,) = [e for e in events_of(run_dir, "message") if e["data"].get("code") == "validation_overlap"]
    assert told["data"]["lines"] == [1]


def test_other_columns_of_a_row_may_be_as_deep_as_they_like(make_run) -> None:
    deep: Any = []
    for _ in range(700):
        deep = [deep]
    rows = [row | {"meta": deep} for row in chat_rows(8)]
    assert prepared(make_run(rows=rows))["counts"]["used"] == 8


def test_separate_rows_are_not_mentioned(make_run, events_of) -> None:
    run_dir = make_run(rows=chat_rows(20), valid_rows=chat_rows(40)[20:])
    prepared(run_dir)
    assert "validation_overlap" not in [e["data"].get("code") for e in events_of(run_dir, "message")]
