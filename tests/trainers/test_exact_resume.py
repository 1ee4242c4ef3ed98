"""A run that was stopped and goes on equals one that was not, bit for bit on CPU, whatever the method."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.test_evaluation import steps_of
from tests.trainers.test_reward import pairs
from tests.trainers.test_sft import StopAt
from trainers.run import run
from trainers.training.ranks import StopRequest

pytestmark = pytest.mark.faults(g=4, everyday=True)
METHODS: dict[str, dict[str, Any]] = {
    "pretraining": {
        "rows": [{"text": f"Case {n}: {n % 7} tablets were taken."} for n in range(40)],
        "valid_rows": [{"text": "Case 99: 3 tablets were taken."}] * 4,
        "block_size": 32,
    },
    "reward": {"rows": pairs(20), "valid_rows": pairs(6, seed=1)},
    "dpo": {
        "rows": pairs(20),
        "valid_rows": pairs(6, seed=1),
        "eval_prompts": ["How is case 3 treated?"],
        "eval_max_tokens": 8,
    },
    "kto": {"rows": pairs(10), "valid_rows": pairs(6, seed=1)},
}


def train(run_dir: Path, *, stop: StopRequest | None = None) -> dict:
    assert run(run_dir, stop=stop or StopRequest()) == 0
    return json.loads((run_dir / "exit.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one(make_run, curve_of, method: str) -> None:
    settings = METHODS[method] | {
        "method": method,
        "lora_dropout": 0.1,
        "max_steps": 8,
        "learning_rate": 1e-3,
    }
    straight = make_run("1", **settings)
    whole = train(straight)
    first = make_run("2", **settings)
    stopped = train(first, stop=StopAt(first, step=4))
    assert stopped["reason"] == "stopped"
    second = make_run("3", resume_roots=(first / "checkpoints",), **settings)
    end = train(second)
    assert (end["reason"], end["resumed_from"]) == ("done", stopped["step"])
    assert curve_of(first) | curve_of(second) == curve_of(straight)
    one, other = (load_file(folder / "output" / "adapter_model.safetensors") for folder in (straight, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name, value in whole["metrics"].items():
        if "valid" in name:
            assert end["metrics"][name] == value, name
    if "eval_prompts" in METHODS[method]:
        # The stop came while step 4 was evaluated.
        known, whole_known = (steps_of(folder / "output") for folder in (second, straight))
        assert all("answers" in whole_known[step] for step in (0, 4, 8))
        assert known == {step: facts for step, facts in whole_known.items() if step != 4}
