"""Token statistics of a file: counted as prepare counts, refused rows apart, and a sample that says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainers.test_preview import CHATS, LONG, PAIRS, PROMPTS, TEXTS
from trainers.folders.artifacts import write_json
from trainers.folders.events import Events
from trainers.prepare import prepare
from trainers.token_stats import main


@pytest.fixture
def stats_of(tmp_path: Path, tiny_model: Path, write_jsonl):
    """The report of the program on some rows."""

    def measure(
        rows: list, *, model_dir: Path = tiny_model, method: str = "supervised", **asked: Any
    ) -> dict:
        request = {"model_dir": str(model_dir), "file": str(write_jsonl(rows, name="measured"))}
        write_json(tmp_path / "request.json", request | {"method": method, "hyperparameters": asked})
        assert main([str(tmp_path / "request.json"), "--report", str(tmp_path / "report.json")]) == 0
        return json.loads((tmp_path / "report.json").read_text())

    return measure


@pytest.mark.parametrize(
    ("method", "rows", "settings"),
    [
        ("supervised", CHATS, {"max_length": 70}),
        ("dpo", PAIRS, {"max_length": 128}),
        ("kto", PAIRS, {"max_length": 400}),
        ("ppo", PROMPTS, {"max_length": 64, "reward_model": "judge"}),
        ("pretraining", TEXTS, {"block_size": 64}),
    ],
)
def test_it_counts_what_prepare_counts(make_run, stats_of, method, rows, settings) -> None:
    run_dir = make_run(method=method, rows=rows, n_valid=0, **settings)
    events = Events(run_dir / "events.jsonl")
    counts = prepare(run_dir, events=events)["counts"]
    events.close()

    found = stats_of(rows, method=method, **settings)

    assert (found["rows"], found["measured_rows"], found["sampled"]) == (len(rows), len(rows), False)
    assert found["examples"] == counts["rows"]
    for name in ("dropped", "dropped_lines", "truncated", "tokens"):
        assert found[name] == counts[name]
    assert found["trainable_tokens"] == (None if method == "ppo" else counts["trainable_tokens"])
    n_lengths = len(rows) if method == "pretraining" else counts["rows"]
    assert sum(bucket["count"] for bucket in found["histogram"]) == n_lengths
    if method != "pretraining":
        assert found["percentiles"]["100"] == counts["longest"]


def test_a_length_falls_into_the_bucket_that_it_just_fills(stats_of) -> None:
    found = stats_of([{"text": "Fever"}, {"text": LONG}], method="pretraining")
    short, long = (found["percentiles"][name] for name in ("50", "100"))
    assert short <= 32 < long
    filled = {bucket["up_to"]: bucket["count"] for bucket in found["histogram"] if bucket["count"]}
    assert filled == {32: 1, next(b["up_to"] for b in found["histogram"] if b["up_to"] >= long): 1}


def test_every_row_is_used_or_reported(stats_of, tokenizer_with) -> None:
    strict = tokenizer_with(
        "{% for m in messages %}{% if m['content'] == 'Hi' %}{{ raise_exception('too short') }}{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    rows = [CHATS[0], "{broken", CHATS[3], "", PAIRS[0], CHATS[1]]
    found = stats_of(rows, model_dir=strict)
    assert [fault["line"] for fault in found["refused_lines"]] == [2, 3, 5]
    assert "too short" in found["refused_lines"][1]["message"]
    assert (found["rows"], found["measured_rows"]) == (5, 5)
    assert found["refused"] + found["examples"] == found["rows"]


def test_of_a_long_file_a_seeded_sample_is_measured(stats_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.token_stats.MAX_ROWS", 3)
    rows = [{"text": "fever " * (i + 1)} for i in range(30)]
    found = stats_of(rows, method="pretraining")
    assert (found["rows"], found["measured_rows"], found["sampled"], found["seed"]) == (30, 3, True, 0)
    assert found == stats_of(rows, method="pretraining")
    assert sum(bucket["count"] for bucket in found["histogram"]) == 3


def test_an_empty_file_has_no_shares(stats_of) -> None:
    found = stats_of([])
    assert (found["rows"], found["measured_rows"], found["refused"]) == (0, 0, 1)
    assert (found["truncated_share"], found["trainable_share"], found["percentiles"]) == (None, None, {})


def test_shares(stats_of) -> None:
    found = stats_of(CHATS, max_length=70)
    assert found["truncated_share"] == found["truncated"] / 4 == 0.5
    assert found["trainable_share"] == round(found["trainable_tokens"] / found["tokens"], 4)
    assert 0 < found["trainable_share"] < 1
