"""The grpo method on the tiny model: answers worth more than those beside them become more likely."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.trainers.judged import QUESTIONS, build_steerable_model, make_reward_model
from tests.trainers.test_sft import StopAt
from trainers import grpo
from trainers.folders.artifacts import write_json
from trainers.folders.events import Events
from trainers.folders.exits import DataError
from trainers.grpo import GroupSampler
from trainers.merge import merge_run
from trainers.models.adapters import load_model
from trainers.prepare import prepare
from trainers.run import run
from trainers.training.draws import draw_answers
from trainers.training.ranks import StopRequest

HAS_A_VOWEL = {"type": "regex", "pattern": "[aeiou]"}
SMALL = {
    "batch_size": 16,
    "micro_batch_size": 4,
    "num_generations": 4,
    "output_max_length": 4,
    "learning_rate": 5e-3,
    "warmup_ratio": 0,
    "lr_scheduler_type": "constant",
    "n_valid": 0,
    "n_epochs": 1,
}


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_steerable_model(tiny_model, tmp_path_factory.mktemp("steerable") / "base")


@pytest.fixture
def make_grpo_run(make_run, base: Path) -> Callable[..., Path]:
    def make(name: str = "1", **settings: Any) -> Path:
        settings = SMALL | {"rows": QUESTIONS, "model_dir": base} | settings
        if "reward_model_dir" not in settings:
            return make_run(name, method="grpo", **{"grader": HAS_A_VOWEL} | settings)
        judge = settings.pop("reward_model_dir")
        run_dir = make_run(name, method="grpo", reward_model="judge", **settings)
        spec = json.loads((run_dir / "spec.json").read_text())
        write_json(run_dir / "spec.json", spec | {"reward_model_dir": str(judge)})
        return run_dir

    return make


def train(run_dir: Path, *, stop: StopRequest | None = None) -> dict[str, Any]:
    assert run(run_dir, stop=stop or StopRequest()) == 0
    return json.loads((run_dir / "exit.json").read_text())


def steps_of(run_dir: Path, events_of: Callable[..., list[dict]]) -> dict[int, dict[str, float]]:
    """What was measured of each step, without the clock."""
    clock = {"step_time_s", "tokens_per_s"}
    return {
        event["step"]: {name: value for name, value in event["data"].items() if name not in clock}
        for event in events_of(run_dir, "metrics")
        if "train_reward" in event["data"]
    }


def test_it_raises_what_a_rule_rewards(make_grpo_run, events_of, tmp_path: Path) -> None:
    run_dir = make_grpo_run(batch_size=64, micro_batch_size=64, num_generations=16, max_steps=24, n_valid=0)
    end = train(run_dir)
    assert (end["reason"], end["step"]) == ("done", 24)
    steps = list(steps_of(run_dir, events_of).values())
    start, spread = steps[0]["train_reward"], steps[0]["train_reward_std"]
    late = sum(step["train_reward"] for step in steps[-4:]) / 4
    assert start < 0.75
    assert late > min(start + spread, 0.95)
    assert end["trained_tokens"] == pytest.approx(64 * sum(step["train_response_tokens"] for step in steps))
    samples = [e["data"] for e in events_of(run_dir, "message") if e["data"].get("code") == "sample"]
    assert samples[0]["prompt"].startswith("Patient")
    assert {sample["reward"] for sample in samples} <= {0.0, 1.0}
    merge_run(run_dir, out_dir=tmp_path / "merged")
    assert "generation_config.json" in {path.name for path in (tmp_path / "merged").iterdir()}


@pytest.mark.faults(g=4, everyday=True)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(make_grpo_run, events_of) -> None:
    # Four prompts a step of sixteen: the stop is in the second round through them.
    settings = {
        "max_steps": 7,
        "save_steps": 3,
        "eval_steps": 3,
        "n_valid": 3,
        "eval_prompts": None,
        "eval_max_tokens": 6,
        "beta": 0.1,
        "rows": QUESTIONS,
    }
    settings["valid_rows"] = QUESTIONS[:3]
    straight = make_grpo_run("1", **settings)
    whole = train(straight)
    first = make_grpo_run("2", **settings)
    stopped = train(first, stop=StopAt(first, step=5))
    assert stopped["reason"] == "stopped"
    second = make_grpo_run("3", resume_roots=(first / "checkpoints",), **settings)
    end = train(second)
    assert end["resumed_from"] == stopped["step"]
    assert steps_of(first, events_of) | steps_of(second, events_of) == steps_of(straight, events_of)
    one, other = (load_file(folder / "output" / "adapter_model.safetensors") for folder in (straight, second))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert end["trained_tokens"] == whole["trained_tokens"]
    assert end["metrics"]["valid_reward"] == whole["metrics"]["valid_reward"]
    assert "valid_loss" not in end["metrics"]
    known = json.loads((second / "output" / "evaluation.json").read_text())["steps"]
    assert [len(known[i]["answers"]) for i in (0, -1)] == [3, 3]
    assert known[-1]["valid_reward"] == end["metrics"]["valid_reward"]
    assert known == [
        facts
        for facts in json.loads((straight / "output" / "evaluation.json").read_text())["steps"]
        if facts["step"] != stopped["step"]
    ]
    assert steps_of(straight, events_of)[7]["train_kl"] > 0


def test_drawing_leaves_a_model_its_own_settings(base: Path) -> None:
    model = load_model(base)
    own = model.generation_config
    drawn = {"max_new_tokens": 3, "seeds": [1, 1, 2], "stop_ids": [1], "pad_id": 0}
    texts = draw_answers(model, [[5, 6], [5, 6], [5, 6]], **drawn)
    assert model.generation_config is own
    assert texts.responses[0].tolist() == texts.responses[1].tolist() != texts.responses[2].tolist()


def test_a_reward_model_gives_the_rewards(make_grpo_run, events_of, base: Path, tmp_path: Path) -> None:
    judge = make_reward_model(base, tmp_path / "judge")
    run_dir = make_grpo_run(reward_model_dir=judge, max_steps=2)
    assert train(run_dir)["reason"] == "done"
    first = steps_of(run_dir, events_of)[1]
    assert first["train_reward_std"] > 0
    assert first["train_frac_reward_zero_std"] == 0


def test_a_reward_model_without_a_trained_head_is_refused(make_grpo_run, base: Path, tmp_path: Path) -> None:
    judge = make_reward_model(base, tmp_path / "judge", trained=False)
    run_dir = make_grpo_run(reward_model_dir=judge, max_steps=1)
    assert run(run_dir, stop=StopRequest()) == 3
    end = json.loads((run_dir / "exit.json").read_text())
    assert end["reason"] == "bad_data"
    assert "no trained head" in end["message"]


def test_a_reward_model_must_have_room_for_question_and_answer(
    make_grpo_run, base: Path, tmp_path: Path
) -> None:
    judge = make_reward_model(base, tmp_path / "judge")
    config = json.loads((judge / "config.json").read_text())
    write_json(judge / "config.json", config | {"max_position_embeddings": 16})
    run_dir = make_grpo_run(reward_model_dir=judge, max_steps=1)
    assert run(run_dir, stop=StopRequest()) == 3
    assert "which has 16 positions" in json.loads((run_dir / "exit.json").read_text())["message"]


def test_held_out_rewards_are_averaged_over_rows_however_they_fall_into_batches(make_grpo_run) -> None:
    settings = {"max_steps": 1, "valid_rows": QUESTIONS[:5], "n_valid": 5}
    found = []
    for name, micro in (("1", 1), ("2", 4)):
        metrics = train(make_grpo_run(name, micro_batch_size=micro, **settings))["metrics"]
        found.append((metrics["valid_reward_before"], metrics["valid_response_tokens_before"]))
    assert found[0] == pytest.approx(found[1])
    assert (5 * found[0][0]) % 1 == pytest.approx(0)


def test_modules_that_are_trained_whole_draw_in_bfloat16(make_grpo_run) -> None:
    run_dir = make_grpo_run(max_steps=1, dtype="bfloat16", modules_to_save=["lm_head"])
    assert train(run_dir)["reason"] == "done"


def test_an_answer_ends_where_the_template_ends_a_turn(
    make_grpo_run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "other-end"
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn, other = tokenizer.eos_token_id, 0
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(other)
    template = str(tokenizer.chat_template).replace("eos_token", repr(tokenizer.convert_ids_to_tokens(turn)))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": other})
    ends: list[set[int]] = []

    class Watched(grpo.GroupTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            ends.append(set(self.eos_token_ids))
            return super().train(*args, **kwargs)

    monkeypatch.setattr(grpo, "GroupTrainer", Watched)
    train(make_grpo_run(model_dir=folder, max_steps=1))
    assert ends == [{turn, other}]


def test_what_the_grader_reads_must_be_in_every_row(make_grpo_run) -> None:
    grader = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
    rows = [{**row, "answer": "rest"} for row in QUESTIONS[:3]] + QUESTIONS[3:4]
    run_dir = make_grpo_run(rows=rows, grader=grader | {"operation": "ilike"})
    with pytest.raises(DataError, match=r"line 4: the grader reads item\.answer"):
        prepare(run_dir, events=Events(run_dir / "events.jsonl"))


def flatten(steps: list[list[int]]) -> list[int]:
    return [row for step in steps for row in step]


def rows_of_epoch(step: int, *, n_rows: int, prompts: int) -> list[list[int]]:
    sampler = GroupSampler(lambda: step, seed=3, n_rows=n_rows, prompts=prompts, answers=3, passes=2)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    size = prompts * 3
    batches = [drawn[start : start + size] for start in range(0, len(drawn), size)]
    assert batches[::2] == batches[1::2]  # each pass of a step is given the same
    assert all(batch[i] == batch[i + 1] == batch[i + 2] for batch in batches for i in range(0, size, 3))
    return [batch[::3] for batch in batches[::2]]


def test_every_row_comes_once_before_any_comes_again_and_each_round_in_another_order() -> None:
    first, second = (rows_of_epoch(step, n_rows=8, prompts=4) for step in (0, 2))
    assert sorted(flatten(first)) == sorted(flatten(second)) == list(range(8))
    assert first != second
    assert rows_of_epoch(3, n_rows=8, prompts=4) == second  # the trainer passes over what was done of it
    # Ten rows do not fill three steps of four: the third begins the next round.
    steps = rows_of_epoch(0, n_rows=10, prompts=4) + rows_of_epoch(3, n_rows=10, prompts=4)
    assert sorted(flatten(steps)[:10]) == sorted(flatten(steps)[10:20]) == list(range(10))


@pytest.mark.long
def test_two_ranks_learn_what_one_process_learns(make_grpo_run, events_of) -> None:
    settings = {"max_steps": 3, "micro_batch_size": 4, "beta": 0.05}
    run_dir = make_grpo_run(nproc=2, **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "trainers.run", run_dir],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = make_grpo_run("2", **settings)
    train(alone)
    ours, theirs = steps_of(run_dir, events_of), steps_of(alone, events_of)
    assert ours.keys() == theirs.keys() == {1, 2, 3}
    for step, numbers in theirs.items():
        for name in ("train_reward", "train_response_tokens", "train_entropy", "grad_norm"):
            assert ours[step][name] == pytest.approx(numbers[name], rel=2e-3), (step, name)
    one, other = (load_file(folder / "output" / "adapter_model.safetensors") for folder in (run_dir, alone))
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=2e-4)
