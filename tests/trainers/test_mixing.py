"""Several training files as one: how much of each, in an order that only the files and the seed decide."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import chat_rows
from tests.trainers.test_run import LIMIT_S, exit_of, launch
from tests.trainers.test_sft import StopAt, train
from trainers.folders.events import Events
from trainers.folders.exits import BadCheckpoint, DataError
from trainers.prepare import prepare
from trainers.specs import SpecError
from trainers.specs.mixture import Share, check_shares, count_mixed
from trainers.tokens.mixing import draw


def tell(answer: str, count: int) -> list[dict]:
    """Conversations that say where they come from."""
    return [
        {"instruction": f"How is case {n} of {answer} treated?", "output": f"{answer} {n}"}
        for n in range(count)
    ]


@pytest.fixture
def make_mix(make_run):
    """Writes the spec.json of a run on several files, each (rows, its share)."""

    def make(name: str, files: list[tuple[list[dict], dict[str, float]]], **settings: Any) -> Path:
        n_rows = sum(len(rows) for rows, _ in files)
        run_dir = make_run(name, rows=(files[0][0] * n_rows)[:n_rows], **{"n_valid": 0} | settings)
        spec = json.loads((run_dir / "spec.json").read_text())
        spec["mixture"] = []
        for i, (rows, share) in enumerate(files):
            path = run_dir / f"part-{i}"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            spec["mixture"].append({"path": str(path)} | share)
        (run_dir / "spec.json").write_text(json.dumps(spec))
        return run_dir

    return make


def prepared(run_dir: Path) -> dict[str, Any]:
    return prepare(run_dir, events=Events(run_dir / "events.jsonl"))


def rows_in(result: dict[str, Any], part: str = "train") -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in Dataset.from_file(result[part] + "/rows.arrow").to_list()]


sizes_and_shares = st.lists(
    st.tuples(st.integers(0, 200), st.floats(0.01, 100, allow_nan=False)), min_size=1, max_size=5
)


@given(sizes_and_shares)
def test_weights_share_out_exactly_the_rows_that_there_are(parts: list[tuple[int, float]]) -> None:
    sizes = [size for size, _ in parts]
    counts = count_mixed(sizes, [Share(weight=weight) for _, weight in parts])
    assert sum(counts) == sum(sizes)
    total = sum(weight for size, weight in parts if size)
    for count, (size, weight) in zip(counts, parts, strict=True):
        exact = sum(sizes) * weight / total if size else 0
        assert abs(count - exact) < 1


@given(sizes_and_shares, st.integers(0, 2**31))
def test_each_row_of_a_file_is_taken_as_often_as_any_other_give_or_take_one(
    parts: list[tuple[int, float]], seed: int
) -> None:
    sizes = [size for size, _ in parts]
    taken = count_mixed(sizes, [Share(epochs=min(epochs, 5)) for _, epochs in parts])
    order = draw(sizes, taken, seed=seed)
    assert order == draw(sizes, taken, seed=seed)
    times = Counter(order)
    first = 0
    for size, count in zip(sizes, taken, strict=True):
        of_part = [times[row] for row in range(first, first + size)]
        assert sum(of_part) == count
        assert not of_part or max(of_part) - min(of_part) <= 1
        first += size


@pytest.mark.parametrize(
    "shares",
    [
        [{"weight": 1}, {"epochs": 1}],
        [{"weight": 1}, {}],
        [{"weight": 1, "epochs": 1}, {"weight": 1, "epochs": 1}],
    ],
)
def test_weights_and_passes_are_not_mixed(shares: list[dict]) -> None:
    with pytest.raises(SpecError):
        check_shares([Share(**share) for share in shares])


def test_a_mixture_holds_each_file_at_its_share(make_mix, events_of) -> None:
    files = [(tell("aspirin", 30), {"weight": 1}), (tell("rest", 10), {"weight": 3})]
    run_dir = make_mix("1", files)
    result = prepared(run_dir)
    (told,) = [e for e in events_of(run_dir, "message") if e["data"].get("code") == "mixed"]
    assert told["data"]["taken"] == [10, 30]
    alone = [rows_in(prepared(make_mix(f"alone {i}", [files[i]]))) for i in (0, 1)]
    mixed = Counter(rows_in(result))
    assert sorted(mixed[row] for row in alone[1]) == [3] * 10
    assert sum(mixed[row] for row in alone[0]) == 10
    assert result["counts"]["used"] == 40


def test_passes_repeat_one_file_and_thin_another(make_mix) -> None:
    result = prepared(make_mix("1", [(tell("a", 12), {"epochs": 0.5}), (tell("b", 4), {"epochs": 2})]))
    assert sorted(Counter(rows_in(result)).values()) == [1] * 6 + [2] * 4


def test_one_file_alone_has_its_share_and_the_limit(make_mix) -> None:
    def count(name: str, **settings: Any) -> list[int]:
        found = Counter(rows_in(prepared(make_mix(name, [(tell("a", 8), {"epochs": 3})], **settings))))
        return sorted(found.values())

    assert count("1") == [3] * 8
    assert sum(count("2", max_train_samples=5)) == 5


def test_a_mixture_knows_its_tokens(make_mix) -> None:
    result = prepared(make_mix("1", [(tell("a", 8), {"epochs": 2}), (tell("b", 8), {"epochs": 1})]))
    info = json.loads((Path(result["train"]) / "info.json").read_text())
    assert info["counts"]["tokens"] == sum(map(len, rows_in(result)))


def test_the_seed_decides_the_order_and_a_limit_cuts_the_whole(make_mix) -> None:
    files = [(tell("a", 20), {"weight": 1}), (tell("b", 20), {"weight": 1})]

    def order(name: str, *, seed: int, **settings: Any) -> list[tuple[int, ...]]:
        run_dir = make_mix(name, files, **settings)
        spec = json.loads((run_dir / "spec.json").read_text())
        (run_dir / "spec.json").write_text(json.dumps(spec | {"seed": seed}))
        return rows_in(prepared(run_dir))

    first, again, other = order("1", seed=1), order("2", seed=1), order("3", seed=2)
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    assert order("4", seed=1, max_train_samples=7) == first[:7]


def test_rows_are_held_out_of_every_file(make_mix) -> None:
    files = [(tell("a", 20), {"epochs": 2}), (tell("b", 10), {"epochs": 1})]
    result = prepared(make_mix("1", files, validation_split=0.2))
    trained, held_out = set(rows_in(result)), rows_in(result, "validation")
    assert len(held_out) == len(set(held_out)) == 4 + 2
    assert not trained & set(held_out)
    assert len(trained) == 16 + 8
    assert result["counts"]["used"] == 32 + 8


def test_what_is_wrong_with_one_of_several_files_is_told_with_its_place(make_mix) -> None:
    files = [(tell("a", 3), {}), ([*tell("b", 3), {"instruction": "And?"}], {})]
    with pytest.raises(DataError, match=r"training_files\.1, line 4: 'output' is missing"):
        prepared(make_mix("1", files))


def test_new_tokens_are_learnt_from_all_files(make_mix) -> None:
    files = [([{"text": "quokka " * 9}], {}), ([{"text": "zyzzyva " * 9}], {})]
    result = prepared(make_mix("1", files, method="pretraining", new_tokens=16, block_size=16))
    learnt = (Path(result["tokenizer"]) / "tokenizer.json").read_text()
    assert "okka" in learnt
    assert "zyva" in learnt


@pytest.mark.long
def test_a_resumed_mixture_goes_on_with_the_same_rows(make_mix, curve_of) -> None:
    files = [(chat_rows(16), {"weight": 1}), (tell("b", 8), {"weight": 2})]
    settings = {"max_steps": 8, "n_valid": 4}
    straight, first = make_mix("1", files, **settings), make_mix("2", files, **settings)
    whole = train(straight)
    assert train(first, stop=StopAt(first, step=3))["reason"] == "stopped"
    second = make_mix("3", files, resume_roots=(first / "checkpoints",), **settings)
    end = train(second)
    assert end["resumed_from"] == 4
    assert end["metrics"]["valid_loss"] == whole["metrics"]["valid_loss"]
    assert curve_of(first) | curve_of(second) == curve_of(straight)


def test_another_share_is_another_training(make_mix) -> None:
    first = make_mix("1", [(chat_rows(16), {"weight": 1}), (tell("b", 8), {"weight": 2})], max_steps=4)
    train(first)
    files = [(chat_rows(16), {"weight": 2}), (tell("b", 8), {"weight": 1})]
    with pytest.raises(BadCheckpoint, match="other hyperparameters"):
        train(make_mix("2", files, max_steps=4, resume_roots=(first / "checkpoints",)))


@pytest.mark.long
def test_two_ranks_train_on_the_mixture_of_one_process(make_mix) -> None:
    files = [(chat_rows(16), {"weight": 1}), (tell("b", 8), {"weight": 2})]
    settings = {"max_steps": 4, "micro_batch_size": 2, "n_valid": 4}
    one, two = make_mix("1", files, **settings), make_mix("2", files, nproc=2, **settings)
    metrics = train(one)["metrics"]
    assert launch(two, nproc=2).wait(LIMIT_S) == 0
    parts = [json.loads((run_dir / "prepared.json").read_text()) for run_dir in (one, two)]
    assert parts[0]["train"] == parts[1]["train"]
    assert exit_of(two)["metrics"]["valid_loss"] == pytest.approx(metrics["valid_loss"], rel=1e-4)
