"""The kto method on the tiny model: good answers gain over the reference, bad ones lose."""

import json
import signal
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset

from tests.trainers.test_dpo import log_probability
from tests.trainers.test_reward import pairs
from tests.trainers.test_run import LIMIT_S, exit_of, launch, reached, wait_for
from trainers.kto import Mismatching
from trainers.merge import merge_run
from trainers.models.adapters import load_model, load_tokenizer
from trainers.prepare import main
from trainers.rows.formats import FORMATS, Labelled, detect_format, read_row
from trainers.run import run
from trainers.specs import SpecError, parse_method, resolve
from trainers.tokens.prepared import ROWS_FILE
from trainers.training.ranks import StopRequest

BETA = 0.2
SETTINGS: dict = {"method": "kto", "learning_rate": 2e-3, "batch_size": 8, "beta": BETA}


def labelled(rows: list[dict]) -> list[dict]:
    """The good answers first, then the bad ones, as files are often sorted."""
    return [
        {"prompt": row["question"], "completion": row[key], "label": key == "response_chosen"}
        for key in ("response_chosen", "response_rejected")
        for row in rows
    ]


@pytest.fixture
def trained(make_run) -> Path:
    run_dir = make_run(
        rows=labelled(pairs(48)), valid_rows=labelled(pairs(20, seed=1)), n_epochs=3, **SETTINGS
    )
    assert run(run_dir, stop=StopRequest()) == 0
    return run_dir


def test_good_answers_gain_and_bad_ones_lose(
    trained: Path, tiny_model: Path, tmp_path: Path, events_of
) -> None:
    metrics = json.loads((trained / "exit.json").read_text())["metrics"]
    # Policy and reference are one: every loss is 1 - sigmoid(0).
    assert metrics["valid_loss_before"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["valid_loss"] < 0.4
    assert metrics["valid_reward_chosen"] > 0.2
    assert metrics["valid_reward_rejected"] < -0.2
    assert metrics["train_margin"] > 0.5
    told = [event["data"] for event in events_of(trained, "metrics")]
    assert told[-1]["full_valid_reward_chosen"] == metrics["valid_reward_chosen"]
    assert all(data["train_kl"] >= 0 for data in told if "train_loss" in data)

    merge_run(trained, out_dir=tmp_path / "merged")
    tokenizer = load_tokenizer(tiny_model)
    policy, reference = load_model(tmp_path / "merged"), load_model(tiny_model)
    for key, name in (("response_chosen", "reward_chosen"), ("response_rejected", "reward_rejected")):
        rewards = [
            BETA
            * (
                log_probability(policy, tokenizer, row["question"], row[key])
                - log_probability(reference, tokenizer, row["question"], row[key])
            )
            for row in pairs(20, seed=1)
        ]
        # The trainer averages over passes, of which some have no answer of one sort.
        assert sum(rewards) / len(rewards) == pytest.approx(metrics[f"valid_{name}"], rel=0.05)


def test_a_label_makes_an_answer_good_or_bad() -> None:
    question = [{"role": "user", "content": "Q"}]
    good = Labelled(1, question, {"role": "assistant", "content": "A"}, label=True)
    for asked in ({"prompt": "Q"}, {"prompt": question}, {"messages": question}):
        row = {**asked, "completion": "A", "label": True}
        assert read_row(row, detect_format(row), line=1) == good
    # A column of another type is no label, and a conversation that carries it stays one.
    assert (
        FORMATS[detect_format({"prompt": "Q", "completion": "A", "label": "cardiology"})].kind
        == "conversation"
    )


def test_a_pair_is_a_good_and_a_bad_answer(make_run) -> None:
    columns = {}
    for name, rows in (("1", pairs(6)), ("2", labelled(pairs(6)))):
        run_dir = make_run(name, rows=rows, n_valid=0, **SETTINGS)
        assert main([str(run_dir)]) == 0
        prepared = json.loads((run_dir / "prepared.json").read_text())
        assert prepared["counts"]["used"] == 12
        table = pyarrow.ipc.open_stream((Path(prepared["train"]) / ROWS_FILE).read_bytes()).read_all()
        columns[name] = sorted(map(str, table.to_pylist()))
    assert columns["1"] == columns["2"]
    assert sum("'label': [1]" in row for row in columns["1"]) == 6


def test_the_kl_term_is_measured_on_the_answers_of_other_rows() -> None:
    rows = [{"prompt_ids": [10, 11], "completion_ids": [20 + i, 2], "label": [i % 2]} for i in range(3)]
    batch = Mismatching(pad_token_id=0, rows=Dataset.from_list(rows))(rows)
    assert batch["label"].tolist() == [False, True, False]
    assert batch["input_ids"][:, 2].tolist() == [20, 21, 22]
    assert batch["KL_input_ids"][:, 2].tolist() == [22, 20, 21]
    assert batch["KL_completion_mask"].tolist() == [[0, 0, 1, 1]] * 3


def test_a_row_alone_in_its_pass_is_measured_on_an_answer_to_another_prompt() -> None:
    rows = [{"prompt_ids": [10 + i // 2], "completion_ids": [20 + i, 2], "label": [i % 2]} for i in range(4)]
    mismatching = Mismatching(pad_token_id=0, rows=Dataset.from_list(rows))
    others = [mismatching([row])["KL_input_ids"].tolist() for row in rows]
    assert others == [[[10, 22, 2]], [[10, 22, 2]], [[11, 20, 2]], [[11, 20, 2]]]
    one_prompt = Mismatching(pad_token_id=0, rows=Dataset.from_list(rows[:2]))
    assert one_prompt([rows[0]])["KL_input_ids"].tolist() == [[10, 21, 2]]


def test_a_row_alone_in_its_pass_teaches_something(make_run, events_of) -> None:
    """Five rows in passes of two: the fifth has the third step for itself."""
    settings = SETTINGS | {"batch_size": 2, "n_epochs": 1, "n_valid": 0, "warmup_ratio": 0}
    run_dir = make_run(rows=labelled(pairs(3))[:5], **settings)
    assert run(run_dir, stop=StopRequest()) == 0
    last = events_of(run_dir, "metrics")[-1]
    assert last["step"] == 3
    assert abs(last["data"]["train_loss"] - 0.5) > 1e-6  # which it is where reward and KL term are one
    assert last["data"]["grad_norm"] > 0


def test_good_and_bad_answers_count_what_their_weights_say(make_run) -> None:
    rows = labelled(pairs(8))
    settings = SETTINGS | {"rows": rows, "valid_rows": [*rows[:6], *rows[-2:]], "max_steps": 4}
    gains = []
    for name, good, bad in (("1", 3.0, 0.25), ("2", 0.25, 3.0)):
        run_dir = make_run(name, desirable_weight=good, undesirable_weight=bad, **settings)
        assert run(run_dir, stop=StopRequest()) == 0
        metrics = json.loads((run_dir / "exit.json").read_text())["metrics"]
        assert metrics["valid_loss_before"] == pytest.approx(0.5 * (6 * good + 2 * bad) / 8, rel=1e-4)
        gains.append((metrics["valid_reward_chosen"], -metrics["valid_reward_rejected"]))
    assert gains[0][0] > gains[1][0]
    assert gains[0][1] < gains[1][1]


def test_answers_of_one_sort_are_refused(make_run) -> None:
    rows = [row | {"label": True} for row in labelled(pairs(4))]
    run_dir = make_run(rows=rows, n_valid=0, **SETTINGS)
    run(run_dir, stop=StopRequest())
    end = json.loads((run_dir / "exit.json").read_text())
    assert end["reason"] == "bad_data"
    assert "labelled true" in end["message"]


@pytest.mark.parametrize(
    ("asked", "nproc", "sizes"),
    [
        ({}, 1, (4, 4)),
        ({}, 4, (8, 2)),
        ({"max_length": 8192}, 1, (4, 2)),
        ({"batch_size": 11}, 1, (11, 11)),
    ],
)
def test_a_pass_has_at_least_two_rows(asked: dict, nproc: int, sizes: tuple[int, int]) -> None:
    method = parse_method({"type": "kto", "kto": {"hyperparameters": asked}}, None)
    resolved = resolve(method, n_examples=50, seed=1, nproc_per_node=nproc)
    assert (resolved["batch_size"], resolved["micro_batch_size"]) == sizes


def test_a_batch_of_one_row_a_process_is_refused() -> None:
    method = parse_method({"type": "kto", "kto": {"hyperparameters": {"batch_size": 2}}}, None)
    with pytest.raises(SpecError, match="micro_batch_size 2 times 2 processes"):
        resolve(method, n_examples=50, seed=1, nproc_per_node=2)


@pytest.mark.long
def test_two_ranks_learn_and_go_on_after_a_stop(make_run, curve_of) -> None:
    settings = SETTINGS | {"nproc": 2, "rows": pairs(48), "valid_rows": pairs(20, seed=1), "n_epochs": 3}
    first = make_run("1", **settings)
    agent = launch(first, nproc=2)
    wait_for(lambda: reached(first, step=5), process=agent)
    agent.send_signal(signal.SIGTERM)
    agent.wait(LIMIT_S)
    assert exit_of(first)["reason"] == "stopped"
    second = make_run("2", resume_roots=(first / "checkpoints",), **settings)
    assert launch(second, nproc=2).wait(LIMIT_S) == 0
    end = exit_of(second)
    assert (end["reason"], end["step"]) == ("done", 36)
    assert list(curve_of(first) | curve_of(second)) == list(range(1, 37))
    assert end["metrics"]["valid_loss"] < 0.4
    assert end["metrics"]["valid_margin"] > 0.5
