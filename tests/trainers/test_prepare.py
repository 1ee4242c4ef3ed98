"""Tokens and labels: what is trained on, what is cached, what is refused."""

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.tiny import CHATML
from trainers.folders.events import Events
from trainers.folders.exits import DataError
from trainers.prepare import prepare
from trainers.rows.formats import Row
from trainers.specs import Layout
from trainers.tokens.conversations import IGNORED, ConversationEncoder, find_stop_ids, load_tokenizer
from trainers.tokens.examples import Example

TURNS = [
    {"role": "user", "content": "I have a fever."},
    {"role": "assistant", "content": "Since when?"},
    {"role": "user", "content": "Monday."},
    {"role": "assistant", "content": "Rest, then."},
]
# Marks what is generated, but closes the mark before the end-of-turn token, as published templates do.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops the reasoning of every assistant turn but the last, as Qwen3's template does.
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ends the whole text with another token, as Phi-3's does.
CLOSING = CHATML.replace(
    "assistant\n' }}{% endif %}", "assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
NEVER_ENDING = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
CHANGING = "{% if messages|length > 1 %}Long talk.\n{% endif %}" + CHATML


def encode(model_dir: Path, messages: list[dict], **settings) -> tuple[Example, list[str]]:
    """The example, and the text of each stretch of it that is trained on."""
    tokenizer = load_tokenizer(model_dir)
    encoder = ConversationEncoder(
        tokenizer, stop_ids=find_stop_ids(tokenizer, model_dir), **({"max_length": 512} | settings)
    )
    (example,) = encoder.encode([Row(1, messages)])
    trained: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            trained[-1].append(token)
        elif trained[-1]:
            trained.append([])
    return example, [tokenizer.decode(tokens) for tokens in trained if tokens]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_assistant_turn_is_trained_with_its_end(tokenizer_with, template: str) -> None:
    _, trained = encode(tokenizer_with(template), TURNS)
    assert trained == ["Since when?<|im_end|>", "Rest, then.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_turn_of_weight_0_is_context_only(tokenizer_with, template: str) -> None:
    _, trained = encode(tokenizer_with(template), [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]])
    assert trained == ["Rest, then.<|im_end|>"]


def test_history_that_the_template_rewrites_is_trained_as_it_stands(tokenizer_with) -> None:
    think = [
        {**m, "content": "<think>hm</think>" + m["content"]} if i % 2 else m for i, m in enumerate(TURNS)
    ]
    _, trained = encode(tokenizer_with(REWRITING), think)
    assert trained == ["Since when?<|im_end|>", "<think>hm</think>Rest, then.<|im_end|>"]


def test_a_text_closed_in_its_own_way_keeps_the_turns_apart(tokenizer_with) -> None:
    _, trained = encode(tokenizer_with(CLOSING), TURNS)
    assert trained[0] == "Since when?<|im_end|>"
    assert trained[1].startswith("Rest, then.<|im_end|>")


@pytest.mark.parametrize(
    ("template", "part"),
    [(NEVER_ENDING, "special token"), (CHANGING, "differently"), (None, "no chat template")],
)
def test_a_template_that_does_not_fit_is_an_error(tokenizer_with, template, part) -> None:
    with pytest.raises(DataError, match=part):
        encode(tokenizer_with(template), TURNS if template != CHANGING else TURNS[:2])


def test_what_a_template_refuses_names_the_line(tokenizer_with) -> None:
    strict = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"line 1: .*no system role"):
        encode(tokenizer_with(strict), TURNS)


@pytest.mark.parametrize("content", ["\nnewline first", " space first", "ünïcödé 🤒", "a\n\n\nb "])
def test_awkward_text_is_trained_whole(tiny_model: Path, content: str) -> None:
    _, trained = encode(tiny_model, [TURNS[0], {"role": "assistant", "content": content}])
    assert trained == [content + "<|im_end|>"]


def test_the_default_system_prompt_is_read_but_not_trained(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    example, trained = encode(tiny_model, TURNS[:2])
    assert "helpful assistant" in tokenizer.decode(example.input_ids)
    assert trained == ["Since when?<|im_end|>"]


def test_tokens_are_those_the_template_gives_with_no_second_bos(tiny_model: Path) -> None:
    example, _ = encode(tiny_model, TURNS)
    expected = load_tokenizer(tiny_model).apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert example.input_ids == expected


def test_truncation_keeps_the_beginning(tiny_model: Path) -> None:
    whole, _ = encode(tiny_model, TURNS)
    cut, _ = encode(tiny_model, TURNS, max_length=30)
    assert cut.input_ids == whole.input_ids[:30]
    assert cut.labels == whole.labels[:30]
    assert cut.full_length == len(whole.input_ids)


def test_train_on_inputs_trains_all(tiny_model: Path) -> None:
    example, _ = encode(tiny_model, TURNS, train_on_inputs=True)
    assert example.labels == example.input_ids


def prepared(run_dir: Path) -> dict:
    events = Events(run_dir / "events.jsonl")
    try:
        return prepare(run_dir, events=events)
    finally:
        events.close()


def test_the_cache_is_used_again_and_only_for_the_same_input(make_run, rows_of) -> None:
    rows = rows_of(9)
    first = prepared(make_run("1", rows=rows, max_length=100))
    again = prepared(make_run("2", rows=rows, max_length=100))
    other = prepared(make_run("3", rows=rows, max_length=101))
    assert (first["cache_hit"]["train"], again["cache_hit"]["train"]) == (False, True)
    assert (again["train"], again["counts"]) == (first["train"], first["counts"])
    assert other["train"] != first["train"]


def reword_template(model_dir: Path) -> None:
    path = model_dir / "chat_template.jinja"
    path.write_text(path.read_text().replace("helpful", "careful"))


def take_a_merge_away(model_dir: Path) -> None:
    path = model_dir / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))


def end_turns_otherwise(model_dir: Path) -> None:
    path = model_dir / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 0]}))


@pytest.mark.parametrize("change", [reword_template, take_a_merge_away, end_turns_otherwise])
def test_another_tokenizer_or_template_is_not_found_in_the_cache(
    make_run, rows_of, tiny_model, tmp_path, change
) -> None:
    """Though it lies in the same folder, and the file and the settings are the same."""
    model_dir = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    rows = rows_of(11)
    first, again = (prepared(make_run(name, rows=rows, model_dir=model_dir)) for name in "12")
    assert (again["train"], again["cache_hit"]["train"]) == (first["train"], True)
    change(model_dir)
    changed = prepared(make_run("3", rows=rows, model_dir=model_dir))
    assert changed["cache_hit"]["train"] is False
    assert changed["train"] != first["train"]


def test_a_named_template_is_not_found_in_the_cache_of_another(make_run, rows_of) -> None:
    rows = rows_of(11)
    folders = {
        name: prepared(make_run(str(name), rows=rows, chat_template=name))["train"]
        for name in (None, "chatml", "vicuna")
    }
    assert len(set(folders.values())) == 3


@pytest.mark.parametrize("which", ["train", "validation"])
def test_bytes_that_have_changed_since_their_check_are_refused(make_run, rows_of, which) -> None:
    """Also where the cache has what was made of them (G20)."""
    rows = rows_of(7)
    whole = make_run("1", rows=rows, max_length=97)
    spec = json.loads((whole / "spec.json").read_text())
    file = Path(spec[f"{which}_file"])
    spec[f"{which}_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (whole / "spec.json").write_text(json.dumps(spec))
    prepared(whole)
    file.write_bytes(file.read_bytes().replace(b"a", b"e", 1))
    with pytest.raises(DataError, match="have changed on the disk"):
        prepared(whole)


def test_a_cache_entry_that_is_not_whole_is_made_again(make_run, rows_of) -> None:
    rows = rows_of(8)
    first = prepared(make_run("1", rows=rows, max_length=99))
    arrow = Path(first["train"]) / "rows.arrow"
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:-10])
    again = prepared(make_run("2", rows=rows, max_length=99))
    assert again["cache_hit"]["train"] is False
    assert arrow.read_bytes() == whole


def test_many_may_prepare_the_same_file_at_once(make_run, rows_of) -> None:
    runs = [make_run(str(n), rows=rows_of(30), max_length=98) for n in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(prepared, runs))
    assert len({result["train"] for result in results}) == 1
    folder = Path(results[0]["train"])
    assert list(folder.parent.glob("*.tmp")) == []


def test_rows_with_nothing_to_train_are_left_out_and_reported(make_run, rows_of, events_of) -> None:
    long = {"messages": [{"role": "user", "content": "a b " * 300}, TURNS[1]]}
    run_dir = make_run(rows=[*rows_of(3), long, rows_of(5)[4]], max_length=90)
    result = prepared(run_dir)
    assert (result["counts"]["rows"], result["counts"]["used"]) == (5, 4)
    assert result["counts"]["dropped_lines"] == [4]
    warned = [e for e in events_of(run_dir, "message") if e["data"].get("code") == "rows_dropped"]
    assert "lines 4" in warned[0]["message"]


@pytest.mark.parametrize("split", [0, 25])
def test_rows_that_may_be_wrong_are_left_out_and_reported(make_run, rows_of, events_of, split: int) -> None:
    rows = rows_of(20)
    rows[3:3], rows[9:9] = ['{"broken'], [{"messages": []}]
    layout = Layout(max_invalid_fraction=0.1)
    settings = {"validation_split_percentage": split} if split else {}
    run_dir = make_run(rows=rows, layout=layout, n_valid=0, **settings)
    result = prepared(run_dir)
    counts = [result[name] for name in ("counts", "validation_counts") if name in result]
    assert sum(found["used"] for found in counts) == 20
    assert sorted(line for found in counts for line in found["refused_lines"]) == [4, 10]
    told = [e["data"] for e in events_of(run_dir, "message") if e["data"].get("code") == "rows_refused"]
    assert sum(found["rows"] for found in told) == 2
    assert sorted(line for found in told for line in found["lines"]) == [4, 10]


def test_a_file_that_ends_early_is_refused_whatever_is_tolerated(make_run, rows_of) -> None:
    run_dir = make_run(rows=rows_of(9), layout=Layout(gzip=True, max_invalid_fraction=0.9), n_valid=0)
    whole = gzip.compress((run_dir / "train").read_bytes())
    (run_dir / "train").write_bytes(whole[:-4])
    with pytest.raises(DataError, match="not whole gzip"):
        prepared(run_dir)


def test_the_same_bytes_read_in_another_way_are_not_found_in_the_cache(make_run) -> None:
    rows = [{"question": "Q", "prompt": "Is it a fever?", "completion": "Yes, it is."}] * 3
    column_map = {"prompt": "question"}
    first = prepared(make_run("1", rows=rows, n_valid=0, layout=Layout(format="prompt_completion")))
    other = Layout(format="prompt_completion", column_map=column_map)
    assert prepared(make_run("2", rows=rows, n_valid=0, layout=other))["train"] != first["train"]


@pytest.mark.parametrize(
    ("rows", "settings", "part"),
    [
        ([{"messages": [TURNS[0]]}], {}, "line 1: this is a prompt row"),
        pytest.param(
            [{"messages": TURNS}, '{"broken'], {}, "line 2: the line is not JSON", marks=pytest.mark.long
        ),
        pytest.param([{"messages": TURNS}], {"max_length": 16}, "raise max_length", marks=pytest.mark.long),
    ],
)
def test_bad_data_exits_3_and_says_which_line(make_run, rows, settings, part) -> None:
    run_dir = (
        make_run(rows=[], n_valid=0, **settings) if not rows else make_run(rows=["x"], n_valid=0, **settings)
    )
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (run_dir / "train").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "trainers.prepare", run_dir], capture_output=True, check=False, timeout=300
    )
    assert done.returncode == 3, done.stderr
    end = json.loads((run_dir / "exit.json").read_text())
    assert end["reason"] == "bad_data"
    assert part in end["message"]
    assert not (run_dir / "prepared.json").exists()


def test_only_so_many_rows_are_read_as_were_asked_for(make_run) -> None:
    run_dir = make_run(max_train_samples=5, max_eval_samples=2)
    prepared = prepare(run_dir, events=Events(run_dir / "events.jsonl"))
    assert (prepared["counts"]["used"], prepared["validation_counts"]["used"]) == (5, 2)
    every_row = prepare(other := make_run("2"), events=Events(other / "events.jsonl"))
    assert every_row["counts"]["used"] == 22
