"""The pretraining method on the tiny model: nothing of the text is lost, and perplexity falls."""

import json
import math
from pathlib import Path

import pytest
from datasets import Dataset

from trainers.merge import merge_run
from trainers.rows.files import Rows
from trainers.run import run
from trainers.specs.layouts import Layout
from trainers.training.ranks import StopRequest

TEXTS = [f"Aspirin thins the blood. Case {n}: the patient took {n % 7} tablets and slept." for n in range(60)]


def rows(texts: list[str]) -> list[dict]:
    return [{"text": text} for text in texts]


def train(run_dir: Path) -> dict:
    assert run(run_dir, stop=StopRequest()) == 0
    return json.loads((run_dir / "exit.json").read_text())


def test_perplexity_falls_and_the_result_merges(make_run, events_of, tmp_path: Path) -> None:
    run_dir = make_run(
        method="pretraining",
        rows=rows(TEXTS),
        valid_rows=rows(["Aspirin thins the blood. Case 99: the patient took 3 tablets and slept."] * 3),
        block_size=64,
        learning_rate=5e-3,
        n_epochs=4,
    )
    metrics = train(run_dir)["metrics"]
    assert metrics["valid_perplexity"] < 0.5 * metrics["valid_perplexity_before"]
    assert metrics["valid_perplexity"] == pytest.approx(math.exp(metrics["valid_loss"]), rel=1e-6)
    saved = events_of(run_dir, "checkpoint")[-1]["metrics"]
    assert saved["valid_perplexity"] == metrics["valid_perplexity"]
    assert merge_run(run_dir, out_dir=tmp_path / "merged")["warnings"] == []


@pytest.mark.parametrize("block_size", [16, 64, 100])
def test_packing_conserves_every_token(make_run, tiny_model: Path, block_size: int) -> None:
    from transformers import AutoTokenizer

    run_dir = make_run(
        method="pretraining", rows=rows(TEXTS), n_valid=0, block_size=block_size, max_steps=1, batch_size=1
    )
    train(run_dir)
    prepared = json.loads((run_dir / "prepared.json").read_text())
    blocks = Dataset.from_file(prepared["train"] + "/rows.arrow")
    assert [len(ids) for ids in blocks["input_ids"]][:-1] == [block_size] * (len(blocks) - 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = []
    for text in TEXTS:
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    packed = [token for block in blocks["input_ids"] for token in block]
    assert packed == expected
    assert blocks["labels"] == blocks["input_ids"]
    assert prepared["counts"]["tokens"] == len(expected)


def test_a_line_of_plain_text_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    path.write_bytes('{"looks": "like JSON"}\nZweite Zeile\r\n\n  第三行  \n'.encode())
    read = Rows(path, Layout("txt"))
    assert [row.text for row in read] == ['{"looks": "like JSON"}', "Zweite Zeile", "  第三行  "]  # pyright: ignore
    assert (read.kind, read.format, read.n_rows, read.blank_lines) == ("document", "plain_text", 3, 1)
