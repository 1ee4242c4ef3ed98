"""A run that ran out of memory goes on from its checkpoint with smaller passes of the same batch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainers.test_exact_resume import METHODS, train
from tests.trainers.test_run import exit_of
from tests.trainers.test_sft import StopAt
from trainers.specs import halve_micro_batch


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_smaller_passes_go_on_where_larger_ones_stopped(make_run, curve_of, method: str) -> None:
    """Only sums are made in another order. (Of kto a pass decides what its rows are compared with.)"""
    data: dict[str, Any] = METHODS.get(method, {}) | {"eval_prompts": []}
    settings = data | {"method": method, "max_steps": 8, "learning_rate": 1e-3}
    straight = make_run("1", micro_batch_size=4, **settings)
    train(straight)
    first = make_run("2", micro_batch_size=4, **settings)
    stopped = train(first, stop=StopAt(first, step=4))
    second = make_run("3", micro_batch_size=2, resume_roots=(first / "checkpoints",), **settings)
    end = train(second)
    assert (end["reason"], end["resumed_from"]) == ("done", stopped["step"])
    assert curve_of(first) | curve_of(second) == pytest.approx(curve_of(straight), rel=1e-4)


def test_a_run_without_enough_memory_says_so(make_run, tmp_path: Path) -> None:
    """A real one: the kernel grants the process no more than it has once all is imported, and a little."""
    run_dir = make_run(batch_size=64, micro_batch_size=64, max_length=2048, rows=_long_rows(), n_valid=0)
    script = tmp_path / "cramped.py"
    script.write_text(
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import torch, transformers, peft, trl, trainers.sft\n"
        "from trainers.training.ranks import StopRequest\n"
        "from trainers.run import run\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))\n"
        "run(Path(sys.argv[1]), stop=StopRequest())\n"
    )
    ended = subprocess.run([sys.executable, script, run_dir], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    end = exit_of(run_dir)
    assert end["reason"] == "cpu_oom", (end, ended.stderr[-2000:])


def _long_rows() -> list[dict[str, Any]]:
    long = "Aspirin thins the blood. " * 400
    messages = [{"role": "user", "content": "Tell."}, {"role": "assistant", "content": long}]
    return [{"messages": messages}] * 64


@pytest.mark.parametrize(
    ("method", "micro", "half"),
    [
        ("supervised", 8, 4),
        ("supervised", 6, 3),
        ("supervised", 5, 1),
        ("supervised", 1, None),
        ("kto", 4, 2),
        ("kto", 6, 3),
        ("kto", 3, None),
    ],
)
def test_half_a_pass_still_makes_the_batch(method: str, micro: int, half: int | None) -> None:
    assert halve_micro_batch(method, micro) == half
