"""Rows of the reference's own data sets, in every stage that they fit.

They may not be passed on, so they are no part of this project. The tests are there only where their folder
is: RESIDENCY_REAL_ROWS names it, or else it is `../shared/data`, beside the project. test_row_formats.py has
rows of our own in the same formats.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.trainers.test_ppo import make_reward_model
from tests.trainers.test_sft import train
from trainers.specs.layouts import Layout
from trainers.tokens.conversations import IGNORED
from trainers.validate import check_file

PROJECT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("RESIDENCY_REAL_ROWS", PROJECT.parent / "shared" / "data"))
__test__ = FOLDER.is_dir()  # pytest collects nothing where it is false

pytestmark = pytest.mark.long
CONVERSATIONS = ["finetune_alpaca.jsonl", "medical_sft_sharegpt.jsonl"]
PREFERENCES = ["reward_pairs.jsonl", "preference_history.jsonl"]
CORPUS = "medical_corpus.txt"
# Long enough for every row: of a language that the tiny tokenizer has not learnt, each byte is a token.
SETTINGS: dict[str, Any] = {"max_length": 8192, "learning_rate": 2e-3, "max_steps": 4, "max_eval_samples": 4}
END = "<|im_end|>"


def read(name: str) -> list[str]:
    return (FOLDER / name).read_text().splitlines()


def parse(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read(name)]


def learn(run_dir: Path) -> tuple[dict[str, float], Dataset]:
    """What the run measured, and its prepared rows, none of which was left out or cut."""
    metrics = train(run_dir)["metrics"]
    assert all(math.isfinite(value) for value in metrics.values())
    return metrics, prepared_rows(run_dir)


def prepared_rows(run_dir: Path) -> Dataset:
    prepared = json.loads((run_dir / "prepared.json").read_text())
    counts = prepared["counts"]
    assert (counts["dropped"], counts["truncated"], counts["blank_lines"]) == (0, 0, 0)
    rows = Dataset.from_file(prepared["train"] + "/rows.arrow")
    assert counts["rows"] == counts["used"] == len(rows)
    return rows


def prompts_of(name: str) -> list[dict[str, Any]]:
    """The rows of a preference file without their answers."""
    return [{k: v for k, v in row.items() if not k.startswith("response_")} for row in parse(name)]


@pytest.mark.parametrize("name", [CORPUS, *CONVERSATIONS, *PREFERENCES])
def test_the_check_of_an_uploaded_file_finds_every_row(name: str) -> None:
    report = check_file(FOLDER / name, Layout.of(name))
    assert (report["rows"], report["errors"], report["blank_lines"]) == (len(read(name)), [], 0)


def test_every_line_of_the_corpus_is_pretrained(make_run, tiny_model: Path) -> None:
    lines = read(CORPUS)
    settings = {name: value for name, value in SETTINGS.items() if name != "max_length"}
    data = {"rows": lines, "valid_rows": lines, "layout": Layout("txt")}
    metrics, blocks = learn(make_run(method="pretraining", block_size=512, **data, **settings))
    assert metrics["valid_loss"] < metrics["valid_loss_before"]
    text = AutoTokenizer.from_pretrained(tiny_model).decode([i for ids in blocks["input_ids"] for i in ids])
    assert text == "".join(line + END for line in lines)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_answer_of_the_conversations_is_trained(make_run, tiny_model: Path, name: str) -> None:
    rows = parse(name)
    answers = [row["output"] if "output" in row else row["conversations"][-1]["value"] for row in rows]
    metrics, prepared = learn(make_run(rows=read(name), valid_rows=read(name), **SETTINGS))
    assert metrics["valid_loss"] < metrics["valid_loss_before"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trained = [[i for i in labels if i != IGNORED] for labels in prepared["labels"]]
    assert tokenizer.batch_decode(trained) == [answer + END for answer in answers]


@pytest.mark.parametrize("method", ["reward", "dpo", "kto"])
@pytest.mark.parametrize("name", PREFERENCES)
def test_every_preference_is_learnt(make_run, tiny_model: Path, method: str, name: str) -> None:
    rows = parse(name)
    metrics, prepared = learn(make_run(method=method, rows=read(name), valid_rows=read(name), **SETTINGS))
    assert metrics["valid_loss"] != metrics["valid_loss_before"]  # too few steps to learn to prefer
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    if method == "kto":
        assert [label for (label,) in prepared["label"]] == [1, 0] * len(rows)
        columns = [prepared["completion_ids"][0::2], prepared["completion_ids"][1::2]]
        asked = prepared["prompt_ids"][::2]
    else:
        columns = [prepared["chosen_ids"], prepared["rejected_ids"]]
        asked = prepared["prompt_ids"]
    for column, key in zip(columns, ("response_chosen", "response_rejected"), strict=True):
        assert tokenizer.batch_decode(list(column)) == [row[key] + END for row in rows]
    for text, row in zip(tokenizer.batch_decode(list(asked)), rows, strict=True):
        assert row["question"] in text
        assert row.get("system", "") in text


@pytest.mark.parametrize("name", [*CONVERSATIONS, *PREFERENCES])
def test_every_question_is_asked_in_ppo(make_run, tiny_model: Path, tmp_path: Path, name: str) -> None:
    rows = read(name) if name in CONVERSATIONS else prompts_of(name)
    ppo = {"max_steps": 2, "output_max_length": 6, "max_length": 8192, "micro_batch_size": 4, "n_valid": 0}
    roomy = shutil.copytree(tiny_model, tmp_path / "roomy")  # some questions have over a thousand tokens
    config = json.loads((roomy / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (roomy / "config.json").write_text(json.dumps(config))
    run_dir = make_run(method="ppo", rows=rows, model_dir=roomy, **ppo)
    spec = json.loads((run_dir / "spec.json").read_text())
    spec["reward_model_dir"] = str(make_reward_model(roomy, tmp_path / "judge"))
    (run_dir / "spec.json").write_text(json.dumps(spec))
    _, prepared = learn(run_dir)
    assert len(prepared) == len(rows)
