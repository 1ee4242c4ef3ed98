"""The dpo method on the tiny model: the policy moves towards preferred answers, the reference does not."""

import json
from pathlib import Path

import pytest
import torch

from tests.trainers.test_reward import pairs
from trainers.merge import merge_run
from trainers.models.adapters import load_model, load_tokenizer
from trainers.run import run
from trainers.training.ranks import StopRequest


@pytest.fixture
def trained(make_run) -> Path:
    run_dir = make_run(
        method="dpo",
        rows=pairs(48),
        valid_rows=pairs(20, seed=1),
        learning_rate=2e-3,
        n_epochs=4,
        batch_size=8,
        beta=0.2,
    )
    assert run(run_dir, stop=StopRequest()) == 0
    return run_dir


def log_probability(model, tokenizer, question: str, answer: str) -> float:
    prompt = [{"role": "user", "content": question}]
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
    n_before = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([tokenizer(whole.rstrip("\n"), add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    chosen = logs.gather(1, ids[0, 1:, None])[:, 0]
    return float(chosen[n_before - 1 :].sum())


def test_the_margin_over_the_reference_grows(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    metrics = json.loads((trained / "exit.json").read_text())["metrics"]
    assert metrics["valid_loss_before"] == pytest.approx(
        0.6931, abs=1e-3
    )  # log 2: policy and reference are one
    assert metrics["valid_loss"] < 0.6
    assert metrics["valid_margin"] > 0.2
    assert metrics["valid_accuracy"] > 0.9

    merge_run(trained, out_dir=tmp_path / "merged")
    tokenizer = load_tokenizer(tiny_model)
    policy, reference = load_model(tmp_path / "merged"), load_model(tiny_model)
    margins = []
    for row in pairs(20, seed=1):
        ratios = [
            log_probability(policy, tokenizer, row["question"], row[key])
            - log_probability(reference, tokenizer, row["question"], row[key])
            for key in ("response_chosen", "response_rejected")
        ]
        margins.append(0.2 * (ratios[0] - ratios[1]))
    # What the trainer calls the margin, computed again from the merged model and its base.
    assert sum(margins) / len(margins) == pytest.approx(metrics["valid_margin"], rel=0.02)
