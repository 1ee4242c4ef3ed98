"""The reward method on the tiny model: it learns to prefer, and its head survives save, load and merge."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.merge import merge_run
from trainers.models.adapters import TRAINED_HEAD_KEY, load_model, load_tokenizer
from trainers.run import run
from trainers.training.ranks import StopRequest

SETTINGS: dict[str, Any] = {"learning_rate": 5e-3, "n_epochs": 6, "batch_size": 8, "lora_rank": 8}


def pairs(count: int, *, seed: int = 0) -> list[dict]:
    """Separable pairs: the better answer names a dose."""
    choose = random.Random(seed)
    return [
        {
            "question": f"How is case {choose.randrange(900)} treated?",
            "response_chosen": f"Give {choose.randrange(1, 9)} tablets of aspirin a day.",
            "response_rejected": f"That is hard to say in case {choose.randrange(900)}.",
        }
        for _ in range(count)
    ]


def train(run_dir: Path) -> dict:
    assert run(run_dir, stop=StopRequest()) == 0
    return json.loads((run_dir / "exit.json").read_text())


@pytest.fixture
def trained(make_run) -> Path:
    run_dir = make_run(method="reward", rows=pairs(48), valid_rows=pairs(21, seed=1), **SETTINGS)
    train(run_dir)
    return run_dir


def scores(model: Any, tokenizer: Any, texts: list[str], *, together: bool) -> torch.Tensor:
    if not together:
        return torch.cat([scores(model, tokenizer, [text], together=True) for text in texts])
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]


def test_it_learns_to_prefer(trained: Path, events_of) -> None:
    metrics = json.loads((trained / "exit.json").read_text())["metrics"]
    assert metrics["valid_accuracy_before"] < 0.9
    assert metrics["valid_accuracy"] > 0.9
    assert metrics["valid_margin"] > metrics["valid_margin_before"] + 1
    assert metrics["valid_loss"] < 0.7 * metrics["valid_loss_before"]
    last = [event["data"] for event in events_of(trained, "metrics")][-1]
    assert {"valid_score_mean", "valid_score_std"} < last.keys()
    results = json.loads((trained / "output" / "eval_results.json").read_text())
    assert results["valid_accuracy"] == metrics["valid_accuracy"]


def test_the_head_survives_save_load_and_merge(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    from trainers.models.adapters import attach_adapter

    report = merge_run(trained, out_dir=tmp_path / "merged")
    assert (report["head"], report["warnings"]) == ("score", [])
    tokenizer = load_tokenizer(tmp_path / "merged")
    merged = load_model(tmp_path / "merged", head="score")
    assert getattr(merged.config, TRAINED_HEAD_KEY) is True
    assert merged.config.pad_token_id == tokenizer.pad_token_id
    better, worse = (
        [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row[key]}],
                tokenize=False,
            )
            for row in pairs(7, seed=2)
        ]
        for key in ("response_chosen", "response_rejected")
    )
    margins = scores(merged, tokenizer, better, together=True) - scores(
        merged, tokenizer, worse, together=True
    )
    assert (margins > 0).float().mean() > 0.8
    texts = better
    together = scores(merged, tokenizer, texts, together=True)
    assert together.std() > 0
    torch.testing.assert_close(together, scores(merged, tokenizer, texts, together=False), atol=1e-5, rtol=0)
    adapted = attach_adapter(
        load_model(tiny_model, head="score"), adapter_dir=trained / "output", tokenizer=tokenizer
    )
    adapted.config.pad_token_id = tokenizer.pad_token_id
    torch.testing.assert_close(together, scores(adapted, tokenizer, texts, together=True), atol=1e-4, rtol=0)
    assert not any("lora_" in name for name in merged.state_dict())


def test_what_the_trainer_evaluates_is_what_the_saved_adapter_says(trained: Path, tiny_model: Path) -> None:
    """Pair by pair, outside of the trainer: so nothing was counted twice and nothing left out."""
    from trainers.models.adapters import attach_adapter

    tokenizer = load_tokenizer(trained / "output")
    model = attach_adapter(
        load_model(tiny_model, head="score"), adapter_dir=trained / "output", tokenizer=tokenizer
    )
    margins = []
    for row in pairs(21, seed=1):
        each = []
        for answer in (row["response_chosen"], row["response_rejected"]):
            messages = [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": answer},
            ]
            text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
            each.append(scores(model, tokenizer, [text], together=True)[0])
        margins.append(each[0] - each[1])
    metrics = json.loads((trained / "exit.json").read_text())["metrics"]
    margin = torch.stack(margins)
    assert metrics["valid_margin"] == pytest.approx(float(margin.mean()), rel=1e-3)
    assert metrics["valid_accuracy"] == pytest.approx(float((margin > 0).float().mean()))
    expected = float(-torch.nn.functional.logsigmoid(margin).mean())
    assert metrics["valid_loss"] == pytest.approx(expected, rel=1e-3)


def test_pairs_that_do_not_fit_are_left_out_and_reported(make_run, events_of) -> None:
    rows = pairs(12)
    rows[4]["response_rejected"] = "word " * 100
    run_dir = make_run(method="reward", rows=rows, n_valid=0, max_steps=2, max_length=160)
    train(run_dir)
    (left_out,) = [e for e in events_of(run_dir, "message") if e["data"].get("code") == "rows_dropped"]
    assert left_out["data"]["lines"] == [5]
