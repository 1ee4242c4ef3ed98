"""PPO as a run: that it learns, stops and goes on, alone and on two ranks, and what it takes for prompts."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.tiny import chat_rows
from tests.trainers.judged import (
    QUESTIONS,
    build_steerable_model,
    make_reward_model,
)
from tests.trainers.test_evaluation import steps_of
from trainers.folders.checkpoints import list_checkpoints
from trainers.merge import merge_run
from trainers.rows.files import Rows
from trainers.run import run
from trainers.specs import SpecError, load_run_spec, parse_method, resolve
from trainers.specs.layouts import Layout
from trainers.training import recipe
from trainers.training.ranks import StopRequest


def train(run_dir: Path, *, stop: StopRequest | None = None) -> dict:
    assert run(run_dir, stop=stop or StopRequest()) == 0
    return json.loads((run_dir / "exit.json").read_text())


def test_it_learns_what_the_reward_model_likes_and_stays_near_the_reference(
    make_ppo_run, events_of, tiny_model: Path, tmp_path: Path
) -> None:
    target = 0.6
    base = build_steerable_model(tiny_model, tmp_path / "base")
    run_dir = make_ppo_run(
        model_dir=base,
        reward_model_dir=make_reward_model(base, tmp_path / "rm"),
        reward_adapter_dir=tmp_path / "rm-adapter",
        batch_size=128,
        micro_batch_size=128,
        max_steps=26,
        lr_scheduler_type="linear",
        output_max_length=4,
        init_kl_coef=0.25,
        target_kl=target,
        missing_eos_penalty=0,
    )
    assert train(run_dir)["reason"] == "done"
    steps = [event["data"] for event in events_of(run_dir, "metrics")]
    start, spread = steps[0]["train_reward"], steps[0]["train_reward_std"]
    late = steps[-6:]
    reward = sum(step["train_reward"] for step in late) / len(late)
    assert steps[0]["train_kl"] == pytest.approx(0, abs=1e-5)
    assert reward > start + spread
    assert all(step["train_kl"] < 2 * target for step in late)


def test_a_run_from_spec_to_a_merged_model(make_ppo_run, events_of, reward_run: Path, tmp_path: Path) -> None:
    run_dir = make_ppo_run(
        max_steps=3,
        reward_model_dir=reward_run / "merged",
        reward_adapter_dir=reward_run / "run" / "output",
        mini_batch_size=4,
        gradient_checkpointing=True,
        n_valid=3,
        eval_steps=2,
        eval_prompts=None,
        eval_max_tokens=8,
    )
    end = train(run_dir)
    assert (end["reason"], end["step"]) == ("done", 3)
    data = [event["data"] for event in events_of(run_dir, "metrics")]
    assert {
        "train_reward",
        "train_reward_std",
        "train_kl",
        "train_kl_coef",
        "train_entropy",
        "train_clip_fraction",
        "train_explained_variance",
        "train_response_tokens",
        "train_policy_loss",
        "train_value_loss",
        "train_loss",
        "learning_rate",
    } <= data[1].keys()
    assert [step["optimizer_steps"] for step in data if "optimizer_steps" in step] == [4, 4, 4]
    assert sum("valid_reward" in step for step in data) == 3  # before, at step 2, and at the end
    told = events_of(run_dir, "checkpoint")[-1]
    assert told["step"] == 3
    assert told["metrics"].keys() >= {"train_reward", "train_kl", "valid_reward"}
    samples = [e["data"] for e in events_of(run_dir, "message") if e["data"].get("code") == "sample"]
    assert samples
    assert samples[0]["prompt"].startswith("Patient")
    names = {path.name for path in (run_dir / "output").iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "trainer_state.json",
    }
    assert names >= {"train_results.json", "eval_results.json", "chat_template.jinja"}
    assert not any("score" in name for name in load_file(run_dir / "output" / "adapter_model.safetensors"))
    config = json.loads((run_dir / "output" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    report = merge_run(run_dir, out_dir=tmp_path / "merged")
    assert report["adapter_rel_effect"] > 0
    assert not list((run_dir / "output").rglob("*.pt"))
    steps = steps_of(tmp_path / "merged")
    assert {step: sorted(facts) for step, facts in steps.items()} == {
        0: ["answers", "step", "valid_reward"],
        2: ["step", "valid_reward"],
        3: ["answers", "step", "valid_reward"],
    }
    assert [answer["prompt"] for answer in steps[3]["answers"]] == [
        row["messages"][0]["content"] for row in chat_rows(43)[40:]
    ]


class StopAt(StopRequest):
    """Asked to stop once the run has told the numbers of a step, at the so-many-th look after that."""

    def __init__(self, run_dir: Path, *, step: int, look: int = 1):
        self._events = run_dir / "events.jsonl"
        self._step, self._look = step, look

    @property
    def requested(self) -> bool:
        self._look -= self._events.exists() and f'"step": {self._step},' in self._events.read_text()
        return self._look <= 0


def numbers_of(events: list[dict]) -> dict[tuple[int, bool], dict[str, float]]:
    """The metrics of each step and of each evaluation."""
    timed = ("step_time_s", "tokens_per_s")
    return {
        (e["step"], "valid_reward" in e["data"]): {k: v for k, v in e["data"].items() if k not in timed}
        for e in events
    }


INTERRUPTED = {
    "max_steps": 6,
    "save_steps": 2,
    "eval_steps": 3,
    "horizon": 20,
    "target_kl": 0.01,
    "lr_scheduler_type": "linear",
    "n_valid": 3,
    "eval_prompts": ["What helps with a rash?"],
    "eval_max_tokens": 8,
}


def assert_goes_on(first: Path, second: Path, straight: Path, events_of: Callable[..., list[dict]]) -> None:
    """The second run, after the first, equals the uninterrupted one in every number and weight."""
    end, whole = (json.loads((folder / "exit.json").read_text()) for folder in (second, straight))
    assert end["reason"] == whole["reason"] == "done"
    one, two = (numbers_of(events_of(folder, "metrics")) for folder in (first, second))
    assert one | two == numbers_of(events_of(straight, "metrics"))
    coefficients = {n["train_kl_coef"] for n in (one | two).values() if "train_kl_coef" in n}
    assert len(coefficients) == 6
    assert end["metrics"] == whole["metrics"]
    assert end["trained_tokens"] == whole["trained_tokens"]
    assert list(steps_of(second / "output")) == [0, 2, 3, 4, 6]
    assert steps_of(second / "output") == steps_of(straight / "output")
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        ours = load_file(second / "checkpoints" / "step-6" / name)
        theirs = load_file(straight / "checkpoints" / "step-6" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (
        torch.load(folder / "checkpoints" / "step-6" / "optimizer.pt")["optimizer"]["state"]
        for folder in (second, straight)
    )
    assert all(torch.equal(ours[n][key], theirs[n][key]) for n in theirs for key in theirs[n])


@pytest.mark.faults(g=4, everyday=True)
def test_a_run_stopped_within_a_round_goes_on_as_if_it_had_not_been(make_ppo_run, events_of) -> None:
    straight = make_ppo_run("1", **INTERRUPTED)
    train(straight)
    # It looks once in the evaluation, before it draws, before each of two parts is scored, before each pass.
    for where, look in {"evaluation": 1, "draw": 2, "scores": 4, "pass 2": 6}.items():
        first = make_ppo_run(f"2 {where}", **INTERRUPTED)
        assert train(first, stop=StopAt(first, step=3, look=look))["reason"] == "stopped"
        assert not (first / "output").exists()
        numbers = numbers_of(events_of(first, "metrics"))
        assert (max(numbers)[0], (3, True) in numbers) == (3, where != "evaluation")
        ((_, _), (step, newest)) = list_checkpoints(first / "checkpoints")
        assert step == 3
        head = load_file(newest / "value_head.safetensors")["weight"]
        assert float(head.abs().sum()) > 0
        second = make_ppo_run(f"3 {where}", resume_roots=(first / "checkpoints",), **INTERRUPTED)
        assert train(second)["resumed_from"] == 3
        assert_goes_on(first, second, straight, events_of)


def test_a_stop_in_the_first_round_leaves_nothing_to_resume(make_ppo_run) -> None:
    class Stop(StopAt):
        @property
        def requested(self) -> bool:
            self._look -= '"training"' in self._events.read_text()
            return self._look <= 0

    run_dir = make_ppo_run()
    end = train(run_dir, stop=Stop(run_dir, step=0, look=4))
    assert (end["reason"], end["step"]) == ("stopped", 0)
    assert list_checkpoints(run_dir / "checkpoints") == []


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.trainers.test_ppo_runs import StopAt
from trainers.run import run

class Death(StopAt):
    @property
    def requested(self):
        if super().requested:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

run_dir = Path(sys.argv[1])
run(run_dir, stop=Death(run_dir, step=3, look=6))
"""


@pytest.mark.faults(g=4, everyday=True)
def test_a_run_killed_between_two_passes_goes_on_from_its_checkpoint(make_ppo_run, events_of) -> None:
    straight = make_ppo_run("1", **INTERRUPTED)
    train(straight)
    first = make_ppo_run("2", **INTERRUPTED)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, first],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert not (first / "exit.json").exists()
    second = make_ppo_run("3", resume_roots=(first / "checkpoints",), **INTERRUPTED)
    assert train(second)["resumed_from"] == 2
    assert_goes_on(first, second, straight, events_of)


@pytest.mark.long
@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_two_ranks_learn_what_one_process_learns(
    make_ppo_run, events_of, mini_batch_size: int | None
) -> None:
    settings = {"max_steps": 3, "micro_batch_size": 2, "mini_batch_size": mini_batch_size, "n_valid": 3}
    run_dir = make_ppo_run(nproc=2, **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "trainers.run", run_dir],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    end = json.loads((run_dir / "exit.json").read_text())
    assert (end["reason"], end["step"]) == ("done", 3)
    steps = [e["data"] for e in events_of(run_dir, "metrics") if "train_kl" in e["data"]]
    assert [step["optimizer_steps"] for step in steps] == [2 * (2 if mini_batch_size else 1)] * 3
    # Counted over both: eight answers a round.
    assert end["trained_tokens"] == pytest.approx(8 * sum(step["train_response_tokens"] for step in steps))
    alone = make_ppo_run("2", **settings)
    train(alone)
    ours, theirs = (numbers_of(events_of(folder, "metrics")) for folder in (run_dir, alone))
    assert ours.keys() == theirs.keys()
    # Each shuffles its own rows into mini-batches, so that from the first pass on these differ.
    same = [key for key in theirs if mini_batch_size is None or key in {(0, True)}]
    for key in same:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5)
    one, other = (load_file(folder / "output" / "adapter_model.safetensors") for folder in (run_dir, alone))
    if mini_batch_size is None:
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-4)


def test_early_stopping_leaves_the_round(make_ppo_run, events_of) -> None:
    settings = {"max_steps": 1, "target_kl": 1e-4, "ppo_epochs": 5, "learning_rate": 2e-2}
    counts = {}
    for name, early in (("1", False), ("2", True)):
        run_dir = make_ppo_run(name, early_stopping=early, **settings)
        train(run_dir)
        counts[early] = events_of(run_dir, "metrics")[0]["data"]["optimizer_steps"]
    assert counts == {False: 5, True: 2}  # the first pass ends before anything has moved


def test_a_reward_model_without_a_trained_head_is_refused(
    make_ppo_run, tiny_model: Path, tmp_path: Path
) -> None:
    untrained = make_reward_model(tiny_model, tmp_path / "untrained", trained=False)
    for name, folder in (("1", untrained), ("2", tiny_model)):
        run_dir = make_ppo_run(name, reward_model_dir=folder)
        assert run(run_dir, stop=StopRequest()) == 3
        end = json.loads((run_dir / "exit.json").read_text())
        assert end["reason"] == "bad_data"
        assert "trained head" in end["message"]


def test_numbers_that_are_none_end_the_run_before_the_weights_do(make_ppo_run, reward_model: Path) -> None:
    broken = AutoModelForSequenceClassification.from_pretrained(reward_model)
    broken.score.weight.data[0, 0] = math.nan
    broken.save_pretrained(reward_model)
    run_dir = make_ppo_run()
    with pytest.raises(ArithmeticError):
        run(run_dir, stop=StopRequest())
    assert json.loads((run_dir / "exit.json").read_text())["reason"] == "nan_loss"
    assert list_checkpoints(run_dir / "checkpoints") == []


def test_another_reward_model_is_another_run(make_ppo_run) -> None:
    one, two = (load_run_spec(make_ppo_run(n, reward_model_digest=d)) for n, d in (("1", "a"), ("2", "b")))
    assert one.settings_sha256() != two.settings_sha256()


# The rows


@pytest.mark.parametrize(
    ("row", "last"),
    [
        ({"question": "Is it flu?"}, "Is it flu?"),
        ({"question": "Is it flu?", "system_prompt": "Be brief."}, "Is it flu?"),
        ({"question": "Is it flu?", "system": "", "history": [["Hi", "Hello."]]}, "Is it flu?"),
        ({"prompt": "Is it flu?"}, "Is it flu?"),
        ({"prompt": [{"role": "user", "content": "Is it flu?"}]}, "Is it flu?"),
        ({"messages": [{"role": "user", "content": "Is it flu?"}]}, "Is it flu?"),
        ({"instruction": "Is it", "input": "flu?", "output": "Yes"}, "Is it\nflu?"),
        ({"conversations": [{"from": "human", "value": "Flu?"}, {"from": "gpt", "value": "Yes"}]}, "Flu?"),
    ],
)
def test_rows_become_prompts(make_ppo_run, tiny_model: Path, row: dict, last: str) -> None:
    from trainers.folders.events import Events
    from trainers.prepare import prepare
    from trainers.tokens.prompts import read_prompt

    run_dir = make_ppo_run(rows=[row])
    prepared = prepare(run_dir, events=Events(None))
    (found,) = recipe.load_rows(prepared["train"])
    assert read_prompt(found["prompt_bytes"]).messages[-1] == {"role": "user", "content": last}
    text = AutoTokenizer.from_pretrained(tiny_model).decode(found["prompt_ids"])
    for turn in row.get("history", []):
        assert all(said in text for said in turn)
    assert text.endswith(f"{last}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("in_file", ["train", "valid"])
def test_a_prompt_and_its_answer_must_fit_into_the_positions(make_ppo_run, in_file: str) -> None:
    long = [{"question": "Is it flu? " * 50}]
    rows = {"rows": long} if in_file == "train" else {"valid_rows": long, "n_valid": 1}
    for name, output_max_length, status in (("1", 512, 3), ("2", 2, 0)):
        run_dir = make_ppo_run(name, output_max_length=output_max_length, max_steps=1, **rows)
        assert run(run_dir, stop=StopRequest()) == status
    end = json.loads((run_dir.with_name("1") / "exit.json").read_text())
    assert end["reason"] == "bad_data"
    assert "(output_max_length) it does not fit into the model's 512 positions" in end["message"]


def test_prompts_are_no_conversations(make_run) -> None:
    run_dir = make_run(rows=QUESTIONS)
    assert run(run_dir, stop=StopRequest()) == 3
    message = json.loads((run_dir / "exit.json").read_text())["message"]
    assert message == "line 1: this is a prompt row, but supervised learns from conversation rows"


def test_a_file_of_prompts_may_hold_answered_ones(write_jsonl) -> None:
    user, answer = {"role": "user", "content": "Flu?"}, {"role": "assistant", "content": "Yes."}
    rows = Rows(write_jsonl([{"messages": [user]}, {"messages": [user, answer]}]), Layout())
    assert [row.messages for row in rows] == [[user], [user]]
    assert (rows.kind, rows.format) == ("prompt", "prompt_messages")


def test_the_mini_batch_must_divide() -> None:
    asked = parse_method(
        {"type": "ppo", "ppo": {"hyperparameters": {"batch_size": 8, "mini_batch_size": 3}}}, None
    )
    with pytest.raises(SpecError, match="mini_batch_size"):
        resolve(asked, n_examples=8, seed=0)
