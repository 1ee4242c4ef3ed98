"""Rows held out of the training file: never trained on, the same ones on every attempt, and counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.tiny import chat_rows
from tests.trainers.test_ppo import QUESTIONS
from tests.trainers.test_reward import pairs
from tests.trainers.test_run import LIMIT_S, exit_of, launch
from tests.trainers.test_sft import StopAt, train
from trainers.folders.events import Events
from trainers.folders.exits import DataError
from trainers.models.vocabulary import PIECES_FILE
from trainers.prepare import prepare
from trainers.run import run
from trainers.specs import SpecError, parse_method, resolve
from trainers.training.ranks import StopRequest

ROWS: dict[str, list[dict]] = {
    "supervised": chat_rows(20),
    "pretraining": [{"text": f"Case {n}: {n % 7} tablets were taken."} for n in range(20)],
    "reward": pairs(20),
    "dpo": pairs(20),
    "kto": pairs(20),
    "ppo": QUESTIONS,
}
SPLIT: dict[str, Any] = {"validation_split_percentage": 20, "n_valid": 0}


def prepared(run_dir: Path) -> dict[str, Any]:
    return prepare(run_dir, events=Events(run_dir / "events.jsonl"))


def rows_in(result: dict[str, Any], part: str) -> list[str]:
    return sorted(map(str, Dataset.from_file(result[part] + "/rows.arrow").to_list()))


def tokens_in(result: dict[str, Any], part: str) -> list[tuple[int, ...]]:
    """The documents of packed rows."""
    ids = [i for row in Dataset.from_file(result[part] + "/rows.arrow")["input_ids"] for i in row]
    ends = [i for i, token in enumerate(ids) if token == 2]
    return sorted(
        tuple(ids[start:end]) for start, end in zip([0, *(i + 1 for i in ends)], ends, strict=False)
    )


@pytest.mark.parametrize("method", ROWS)
def test_what_is_trained_and_what_is_held_out_make_up_the_file(make_run, events_of, method: str) -> None:
    rows = ROWS[method]
    settings = {"method": method, "rows": rows}
    split = prepared(run_dir := make_run("1", **settings, **SPLIT))
    whole = prepared(make_run("2", n_valid=0, **settings))
    read = tokens_in if method == "pretraining" else rows_in
    trained, held_out = read(split, "train"), read(split, "validation")
    assert sorted([*trained, *held_out]) == read(whole, "train")
    assert not set(trained) & set(held_out)
    n_held_out = round(len(rows) / 5)
    assert len(held_out) == n_held_out * (2 if method == "kto" else 1)
    (told,) = [event for event in events_of(run_dir, "message") if event["data"].get("code") == "held_out"]
    assert (told["data"]["rows"], told["data"]["of"]) == (n_held_out, len(rows))
    assert whole["validation"] is None


def test_both_answers_of_a_pair_are_on_one_side(make_run) -> None:
    split = prepared(make_run(method="kto", rows=pairs(20), **SPLIT))
    asked = [
        {tuple(row["prompt_ids"]) for row in Dataset.from_file(split[part] + "/rows.arrow").to_list()}
        for part in ("train", "validation")
    ]
    assert not asked[0] & asked[1]


def test_the_seed_chooses_and_the_limits_cut_each_part(make_run) -> None:
    def held_out(name: str, *, seed: int, **settings: Any) -> tuple[list[str], list[str]]:
        run_dir = make_run(name, rows=chat_rows(20), **SPLIT | settings)
        spec = json.loads((run_dir / "spec.json").read_text())
        (run_dir / "spec.json").write_text(json.dumps(spec | {"seed": seed}))
        result = prepared(run_dir)
        return rows_in(result, "train"), rows_in(result, "validation")

    first, again, other = held_out("1", seed=1), held_out("2", seed=1), held_out("3", seed=2)
    assert first == again
    assert first[1] != other[1]
    cut = held_out("4", seed=1, max_train_samples=3, max_eval_samples=2)
    assert [len(part) for part in cut] == [3, 2]
    assert set(cut[0]) < set(first[0])
    assert set(cut[1]) < set(first[1])


def test_rows_that_are_left_out_are_neither_held_out_nor_counted(make_run, events_of) -> None:
    good = chat_rows(20)
    rows = [row for one in good for row in (one, '{"nothing": 1}')]
    run_dir = make_run(rows=rows, n_valid=0, validation_split=5, max_train_samples=9)
    spec = json.loads((run_dir / "spec.json").read_text())
    spec["train_layout"]["max_invalid_fraction"] = 0.5
    (run_dir / "spec.json").write_text(json.dumps(spec))
    split = prepared(run_dir)
    trained, held_out = rows_in(split, "train"), rows_in(split, "validation")
    assert (len(trained), len(held_out)) == (9, 5)
    assert not set(trained) & set(held_out)
    told = [
        event["data"] for event in events_of(run_dir, "message") if event["data"].get("code") == "held_out"
    ]
    assert [(one["rows"], one["of"]) for one in told] == [(5, 20)]


def test_a_split_is_a_fraction_or_a_count_or_a_percentage(make_run) -> None:
    def count(name: str, **split: float) -> int:
        return prepared(make_run(name, rows=chat_rows(20), n_valid=0, **split))["validation_counts"]["used"]

    assert count("1", validation_split=0.1) == count("2", validation_split=2) == 2
    assert count("3", validation_split_percentage=10) == 2
    with pytest.raises(DataError, match="validation_split: the training file has too few rows"):
        count("4", validation_split=20)
    for wrong in (0.7, 1.5, 0, -1):
        with pytest.raises(SpecError, match="validation_split"):
            parse_method(None, {"validation_split": wrong})
    with pytest.raises(ValueError, match="say the same"):
        count("5", validation_split=2, validation_split_percentage=10)


def test_at_least_one_row_is_held_out_and_one_is_trained(make_run) -> None:
    least = prepared(make_run("1", rows=chat_rows(5), n_valid=0, validation_split_percentage=0.001))
    assert (least["counts"]["used"], least["validation_counts"]["used"]) == (4, 1)
    with pytest.raises(DataError, match="too few rows"):
        prepared(make_run("2", rows=chat_rows(1), **SPLIT))


def test_new_tokens_are_not_learnt_from_held_out_documents(make_run) -> None:
    words = ["zyzzyva", "quokka", "xylophone", "vuvuzela", "jackdaw", "wombat"]
    settings = {"method": "pretraining", "new_tokens": 12, "n_valid": 0, "validation_split_percentage": 50}
    result = prepared(make_run(rows=[{"text": " ".join([word] * 9)} for word in words], **settings))
    tokenizer = AutoTokenizer.from_pretrained(result["tokenizer"])
    learnt = json.loads((Path(result["tokenizer"]) / PIECES_FILE).read_text())
    trained, held_out = (
        {word for word in words if any(word in tokenizer.decode(ids) for ids in tokens_in(result, part))}
        for part in ("train", "validation")
    )
    assert len(trained) == len(held_out) == 3
    for token in learnt:
        assert any(tokenizer.decode([int(token)]).strip() in word for word in trained)


def test_a_resumed_run_has_held_out_the_same_rows(make_run, curve_of) -> None:
    settings = SPLIT | {"rows": chat_rows(20), "max_steps": 8}
    straight, first = make_run("1", **settings), make_run("2", **settings)
    whole = train(straight)
    assert train(first, stop=StopAt(first, step=3))["reason"] == "stopped"
    second = make_run("3", resume_roots=(first / "checkpoints",), **settings)
    end = train(second)
    assert end["resumed_from"] == 4
    assert end["metrics"]["valid_loss"] == whole["metrics"]["valid_loss"]
    assert curve_of(first) | curve_of(second) == curve_of(straight)
    parts = [json.loads((run_dir / "prepared.json").read_text()) for run_dir in (straight, first, second)]
    assert len({(part["train"], part["validation"]) for part in parts}) == 1


@pytest.mark.long
def test_two_ranks_hold_out_what_one_process_does(make_run) -> None:
    settings = SPLIT | {"rows": chat_rows(20), "max_steps": 4, "micro_batch_size": 2}
    one, two = make_run("1", **settings), make_run("2", nproc=2, **settings)
    metrics = train(one)["metrics"]
    assert launch(two, nproc=2).wait(LIMIT_S) == 0
    parts = [json.loads((run_dir / "prepared.json").read_text()) for run_dir in (one, two)]
    assert (parts[0]["train"], parts[0]["validation"]) == (parts[1]["train"], parts[1]["validation"])
    assert exit_of(two)["metrics"]["valid_loss"] == pytest.approx(metrics["valid_loss"], rel=1e-4)


def test_a_validation_file_leaves_nothing_to_hold_out(make_run) -> None:
    run_dir = make_run(**SPLIT)
    spec = json.loads((run_dir / "spec.json").read_text())
    (run_dir / "spec.json").write_text(json.dumps(spec | {"validation_file": spec["train_file"]}))
    assert run(run_dir, stop=StopRequest()) == 3
    assert "give one of the two" in exit_of(run_dir)["message"]


@pytest.mark.parametrize("percentage", [-1, 51, "half"])
def test_more_than_half_is_not_held_out(percentage: Any) -> None:
    with pytest.raises(SpecError, match="validation_split_percentage"):
        parse_method(None, {"validation_split_percentage": percentage})


def test_the_number_of_steps_is_that_of_the_rows_left() -> None:
    method = parse_method(None, {"validation_split_percentage": 50, "n_epochs": 1, "batch_size": 1})
    resolved = resolve(method, n_examples=400, seed=1)
    assert resolved["save_steps"] == 20
