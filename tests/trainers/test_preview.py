"""A preview shows what training sees: the very tokens and labels that prepare writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from tests.tiny import build_tokenizer, chat_rows
from trainers.folders.artifacts import write_json
from trainers.folders.events import Events
from trainers.prepare import prepare
from trainers.preview import main
from trainers.tokens.conversations import IGNORED, load_tokenizer
from trainers.tokens.prepared import ROWS_FILE
from trainers.tokens.rendering import render
from trainers.tokens.token_texts import describe_tokens

LONG = " ".join(f"word{i}" for i in range(60))
CHATS = [
    *chat_rows(2),
    {
        "messages": [
            {"role": "user", "content": "Ünïcödé 🤒?"},
            {"role": "assistant", "content": "First 🩺.", "weight": 0},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Second\n\n 数据."},
        ]
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": LONG}]},
]
PAIRS = [
    {"prompt": "Is a rash bad?", "chosen": "See a doctor.", "rejected": "No."},
    {"prompt": LONG, "chosen": "Yes.", "rejected": LONG},
]
LABELLED = [{"prompt": "Fever?", "completion": "Rest.", "label": i == 0} for i in range(2)]
PROMPTS = [{"prompt": "What now?"}, {"prompt": LONG}]
TEXTS = [{"text": f"{row['messages'][1]['content']} {LONG}"} for row in chat_rows(3)]


@pytest.fixture
def preview_of(tmp_path: Path, tiny_model: Path, write_jsonl):
    """The report of the program on some rows."""

    def look(rows: list, *, model_dir: Path = tiny_model, **asked: Any) -> dict:
        shown = asked.pop("show", None)
        request = {
            "model_dir": str(model_dir),
            "file": str(write_jsonl(rows, name="previewed")),
            "layout": {"container": "txt" if asked.pop("plain_text", False) else "jsonl"},
            "method": asked.pop("method", "supervised"),
            "hyperparameters": asked,
            **({"rows": shown} if shown else {}),
        }
        write_json(tmp_path / "request.json", request)
        report = tmp_path / "report.json"
        assert main([str(tmp_path / "request.json"), "--report", str(report)]) == 0
        return json.loads(report.read_text())

    return look


def prepared_rows(run_dir: Path) -> list[dict]:
    events = Events(run_dir / "events.jsonl")
    folder = prepare(run_dir, events=events)["train"]
    events.close()
    with pyarrow.OSFile(f"{folder}/{ROWS_FILE}") as file, pyarrow.ipc.open_stream(file) as stream:
        return stream.read_all().to_pylist()


def labelled(text: dict) -> list[tuple[int, int]]:
    """(token, label) as a trainer of the text would have them."""
    return [(t["id"], t["id"] if t["trained"] else IGNORED) for t in text["tokens"]]


def as_texts(row: dict) -> list[list[tuple[int, int]]]:
    """The texts of a prepared row, with their labels."""
    if "labels" in row:
        return [list(zip(row["input_ids"], row["labels"], strict=True))]
    before = [(token, IGNORED) for token in row["prompt_ids"]]
    answers = [row[name] for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]
    return [[*before, *((token, token) for token in answer)] for answer in answers] or [before]


@pytest.mark.parametrize(
    ("method", "rows", "settings", "unused"),
    [
        ("supervised", CHATS, {}, []),
        ("supervised", CHATS, {"max_length": 120}, []),
        ("supervised", CHATS, {"max_length": 70}, [3]),
        ("supervised", CHATS, {"train_on_inputs": True, "max_length": 70}, []),
        ("supervised", CHATS, {"chat_template": "vicuna"}, []),
        ("dpo", PAIRS, {"max_length": 128}, [2]),
        ("reward", PAIRS, {}, []),
        ("kto", LABELLED, {}, []),
        ("kto", PAIRS, {"max_length": 400}, []),  # of the second pair, only the chosen answer fits
        ("ppo", PROMPTS, {"max_length": 64, "reward_model": "judge"}, [2]),
        ("pretraining", TEXTS, {"block_size": 64}, []),
    ],
)
def test_the_trained_tokens_are_the_labels_that_prepare_writes(
    make_run, preview_of, method, rows, settings, unused
) -> None:
    written = prepared_rows(make_run(method=method, rows=rows, n_valid=0, **settings))
    n_shown = len(written) if method == "pretraining" else len(rows)
    report = preview_of(rows, method=method, show=list(range(1, n_shown + 1)), **settings)

    assert [row["row"] for row in report["rows"] if not row["used"]] == unused
    texts = [labelled(text) for row in report["rows"] if row["used"] for text in row["texts"]]
    if method != "ppo":
        texts = [text for text in texts if any(label != IGNORED for _, label in text)]
    assert texts == [text for row in written for text in as_texts(row)]


def test_a_row_that_is_cut_before_its_answer_is_not_used(preview_of) -> None:
    (row,) = preview_of(CHATS, max_length=16, show=[1])["rows"]
    assert (row["used"], row["truncated"], row["tokens"], row["trainable_tokens"]) == (False, True, 16, 0)
    assert "max_length 16" in row["error"]


def test_the_texts_of_the_tokens_are_what_the_template_wrote(tiny_model, preview_of) -> None:
    tokenizer = load_tokenizer(tiny_model)
    report = preview_of(CHATS, show=[3, 1])
    for row, number in zip(report["rows"], (0, 2), strict=True):
        (text,) = row["texts"]
        assert text["text"] == render(tokenizer, CHATS[number]["messages"], [])
        assert "".join(token["text"] for token in text["tokens"]) == text["text"]
        assert (row["row"], row["line"], row["tokens"]) == (number + 1, number + 1, len(text["tokens"]))


def test_tokens_that_share_a_character_show_their_bytes(tiny_model) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ids = tokenizer("a🤒b", add_special_tokens=False)["input_ids"]
    tokens = describe_tokens(tokenizer, ids)
    assert "".join(token["text"] for token in tokens) == "a🤒b"
    shared = [token for token in tokens if "bytes" in token]
    assert len(shared) > 1
    assert bytes.fromhex(" ".join(token["bytes"] for token in shared)) == "🤒".encode()
    assert [token["text"] for token in shared] == [*[""] * (len(shared) - 1), "🤒"]


def test_half_a_character_at_the_end_is_shown_as_such(tiny_model) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ids = tokenizer("a🤒", add_special_tokens=False)["input_ids"][:-1]
    tokens = describe_tokens(tokenizer, ids)
    assert tokens[-1]["text"] == "\ufffd"
    assert "🤒".encode().startswith(bytes.fromhex(" ".join(t["bytes"] for t in tokens if "bytes" in t)))


def test_a_cut_row_says_so(preview_of) -> None:
    (row,) = preview_of(CHATS, show=[4], max_length=60)["rows"]
    assert (row["truncated"], row["tokens"]) == (True, 60)
    assert row["full_tokens"] > 60
    assert 0 < row["trainable_tokens"] == sum(token["trained"] for token in row["texts"][0]["tokens"])


def test_a_pair_shows_both_answers(preview_of) -> None:
    (row,) = preview_of(PAIRS, method="dpo", show=[1])["rows"]
    assert [text["name"] for text in row["texts"]] == ["chosen", "rejected"]
    said = ["".join(t["text"] for t in text["tokens"] if t["trained"]) for text in row["texts"]]
    assert said == ["See a doctor.<|im_end|>", "No.<|im_end|>"]


def test_of_a_prompt_nothing_is_trained(preview_of) -> None:
    (row,) = preview_of(PROMPTS, method="grpo", show=[1])["rows"]
    assert (row["used"], row["trainable_tokens"], row["texts"][0]["name"]) == (True, 0, "prompt")
    assert row["texts"][0]["text"].endswith("<|im_start|>assistant\n")


def test_refused_rows_say_why_and_where(tokenizer_with, preview_of) -> None:
    strict = tokenizer_with(
        "{% for m in messages %}{% if m['content'] == 'Hi' %}{{ raise_exception('too short') }}{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    rows = [CHATS[0], "", "{broken", PAIRS[0], CHATS[3]]
    report = preview_of(rows, show=[1, 2, 3, 4], model_dir=strict)
    shown = [(row["row"], row["line"], row["used"]) for row in report["rows"]]
    assert shown == [(1, 1, True), (2, 3, False), (3, 4, False), (4, 5, False)]
    errors = [row["error"] for row in report["rows"]]
    assert errors[0] is None
    assert "the line is not JSON" in errors[1]
    assert "the rows before it are" in errors[2]
    assert "too short" in errors[3]


def test_rows_of_another_kind_are_refused_each(preview_of) -> None:
    report = preview_of(CHATS, method="dpo")
    assert [row["error"] for row in report["rows"]] == [
        "this is a conversation row, but dpo learns from preference rows"
    ] * 3


def test_without_row_numbers_the_first_three_are_shown_as_far_as_there_are(preview_of) -> None:
    assert [row["row"] for row in preview_of(CHATS)["rows"]] == [1, 2, 3]
    assert [row["row"] for row in preview_of(CHATS[:2])["rows"]] == [1, 2]
    (empty,) = preview_of([])["rows"]
    assert (empty["line"], empty["error"]) == (1, "the file is empty")


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"show": [5]}, "row", "the file has 4 rows"),
        ({"method": "dancing"}, "method", "available"),
        ({"block_size": 64}, "method.supervised.hyperparameters.block_size", "unknown"),
        ({"max_length": 3}, "method.supervised.hyperparameters.max_length", "16"),
        ({"method": "pretraining", "show": [100_000_000]}, None, "not shown"),
    ],
)
def test_what_cannot_be_shown_is_told_in_the_report(preview_of, asked, param, words) -> None:
    error = preview_of(CHATS, **asked)["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_a_model_without_a_template_is_told(preview_of, tmp_path: Path) -> None:
    build_tokenizer(tmp_path / "base", chat_template=None)
    assert "chat template" in preview_of(CHATS, model_dir=tmp_path / "base")["error"]["message"]
    assert "tokenizer" in preview_of(CHATS, model_dir=tmp_path / "nowhere")["error"]["message"]


def test_documents_are_shown_as_blocks_and_a_refused_line_is_named(preview_of) -> None:
    report = preview_of(["one", "two 🩺", "three"], method="pretraining", plain_text=True, new_tokens=8)
    assert [row["texts"][0]["text"] for row in report["rows"]] == [
        "one<|im_end|>two 🩺<|im_end|>three<|im_end|>"
    ]
    assert "new_tokens" in report["notes"][0]
    broken = preview_of([TEXTS[0], "{"], method="pretraining", show=[9])
    assert broken["error"]["message"].startswith("line 2: ")


def test_a_very_long_text_is_shown_up_to_a_bound(preview_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.preview.SHOWN_TOKENS", 10)
    (row,) = preview_of(CHATS, show=[4])["rows"]
    (text,) = row["texts"]
    assert (len(text["tokens"]), text["tokens_left_out"]) == (10, row["tokens"] - 10)


@pytest.mark.long
def test_it_runs_as_a_program(tmp_path: Path, tiny_model: Path, write_jsonl) -> None:
    request = {"model_dir": str(tiny_model), "file": str(write_jsonl(CHATS)), "rows": [1]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    argv = [sys.executable, "-m", "trainers.preview", "request.json", "--report", "report.json"]
    environment = {"PYTHONPATH": str(Path.cwd()), "HF_HUB_OFFLINE": "1"}
    subprocess.run(argv, cwd=tmp_path, env=environment, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"][0]["used"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"request.json", "report.json", "train"}
