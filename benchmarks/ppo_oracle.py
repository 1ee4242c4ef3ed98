"""Our PPO against TRL 1.12.0's PPOTrainer: memory and speed on SmolLM2-135M, and reward at equal KL.

`python benchmarks/ppo_oracle.py [--pairs 3] [--seeds 3] [--out FILE]` gives both the same models, prompts,
LoRA and batch, and starts them in turn, each in a process of its own. An update is a round: answers, scores,
four passes. TRL runs in an environment of its own, .oracle, which is made at the first time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.demo import GGUF, fetch_base_model  # noqa: E402
from tests.tiny import SYMPTOMS  # noqa: E402
from trainers.specs import RunSpec, parse_method, resolve  # noqa: E402

PARTS = ROOT / "benchmarks" / "ppo_oracle"
ORACLE = ROOT / ".oracle"
QUESTIONS = [f"A patient has had {symptom} for {n} days. What now?" for n in (2, 9) for symptom in SYMPTOMS]
# What both are given. TRL's coefficient is fixed, so ours is.
COMMON = {"rank": 8, "alpha": 16, "pad_id": 0, "passes": 4, "kl_coef": 0.2}
SPEED = COMMON | {"model": "smol", "batch": 4, "answer_tokens": 24, "learning_rate": 1.4e-5}
CURVE = COMMON | {"model": "tiny", "batch": 128, "answer_tokens": 4, "learning_rate": 3e-3, "updates": 20}
THREADS = 1  # of either: with more, a core that others use holds up all of them
KL_LEVELS = (0.25, 0.5, 0.75)  # of the largest KL that every run reaches
MEMORY_TARGET, SPEED_TARGET = 0.45, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3, help="of each run; the first does not count")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ppo_oracle.json")
    options = parser.parse_args()
    python = prepare_oracle()
    fetch_base_model()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), python=python)
        result = {
            "benchmark": "ppo_oracle",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": {
                "cpus": os.cpu_count(),
                "threads": THREADS,
                "load_at_start": round(os.getloadavg()[0], 1),
            },
            "versions": (PARTS / "requirements.txt").read_text().splitlines()[1:],
            "cost": compare_cost(runs, pairs=options.pairs, updates=options.updates),
            "reward_at_equal_kl": compare_rewards(runs, seeds=options.seeds),
        }
    text = json.dumps(result, indent=2)
    print(text)
    options.out.write_text(text + "\n")


def prepare_oracle() -> Path:
    """The interpreter of the oracle's environment, made where it is missing or not as pinned."""
    python, pins = ORACLE / "bin" / "python", PARTS / "requirements.txt"
    installed = ORACLE / ".installed"
    if not installed.exists() or installed.read_text() != pins.read_text():
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(ORACLE)], check=True)
        install = ["-m", "pip", "install", "--progress-bar", "off", "--quiet", "-r", str(pins)]
        subprocess.run([str(python), *install], check=True)
        installed.write_text(pins.read_text())
    return python


class Runs:
    """Starts runs of either trainer on the models in `folder`, one after the other."""

    def __init__(self, folder: Path, *, python: Path):
        self._folder, self._python = folder, python
        self._count = 0
        build = [sys.executable, str(PARTS / "models.py"), str(folder), str(GGUF)]
        subprocess.run(build, check=True, env=_environment(), stdout=subprocess.DEVNULL)

    def ours(self, task: dict[str, Any]) -> dict[str, Any]:
        """A run of trainers.run, as a worker starts it."""
        run_dir = self._next()
        (run_dir / "spec.json").write_text(self._write_spec(task, run_dir).model_dump_json())
        argv = [sys.executable, "-m", "trainers.run", str(run_dir)]
        run = self._follow(argv, log=run_dir / "log", told=run_dir / "events.jsonl", mark='"type": "metrics"')
        records = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        steps = [record["data"] for record in records if record["type"] == "metrics"]
        # Our KL is a token's; theirs is summed over an answer.
        run["updates"] = [
            {"reward": step["train_reward"], "kl": step["train_kl"] * step["train_response_tokens"]}
            for step in steps
        ]
        return run

    def theirs(self, task: dict[str, Any]) -> dict[str, Any]:
        """A run of TRL."""
        run_dir = self._next()
        models = self._folder / task["model"]
        prompts = [[{"role": "user", "content": question}] for question in choose_questions(task)]
        given = task | {"base": str(models / "base"), "reward": str(models / "reward"), "prompts": prompts}
        (run_dir / "task.json").write_text(json.dumps(given))
        told = run_dir / "updates.jsonl"
        argv = [str(self._python), str(PARTS / "theirs.py"), str(run_dir / "task.json"), str(told)]
        run = self._follow(argv, log=run_dir / "log", told=told, mark='"reward"')
        run["updates"] = [json.loads(line) for line in told.read_text().splitlines()]
        return run

    def _next(self) -> Path:
        self._count += 1
        folder = self._folder / "runs" / str(self._count)
        folder.mkdir(parents=True)
        return folder

    def _follow(self, argv: list[str], *, log: Path, told: Path, mark: str) -> dict[str, Any]:
        """Runs a process to its end; an update ends when one more line of `told` has the mark.

        Its peak of resident memory, and the seconds of an update, of the clock and of its processors: the
        median without the first, which warms up. Others' load slows the clock more than the processors.
        """
        ends: list[tuple[float, float]] = []
        with log.open("wb") as stream:
            process = subprocess.Popen(argv, env=_environment(), stdout=stream, stderr=stream, cwd=ROOT)
            watched = psutil.Process(process.pid)
            while (found := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                if told.exists() and told.read_text().count(mark) > len(ends):
                    used = watched.cpu_times()
                    ends.append((time.monotonic(), used.user + used.system))
                time.sleep(0.02)
        _, status, usage = found
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(argv)} failed:\n{log.read_text()[-3000:]}")
        spent = [(later[0] - one[0], later[1] - one[1]) for one, later in pairwise(ends)]
        return {
            "peak_mib": usage.ru_maxrss / 1024,
            "update_s": statistics.median(clock for clock, _ in spent),
            "update_cpu_s": statistics.median(cpu for _, cpu in spent),
        }

    def _write_spec(self, task: dict[str, Any], run_dir: Path) -> RunSpec:
        models = self._folder / task["model"]
        questions = choose_questions(task)
        (run_dir / "train").write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
        wanted = {
            "batch_size": task["batch"],
            "micro_batch_size": task["batch"],
            "output_max_length": task["answer_tokens"],
            "max_steps": task["updates"],
            "ppo_epochs": task["passes"],
            "learning_rate": task["learning_rate"],
            "lr_scheduler_type": "constant",
            "lora_rank": task["rank"],
            "lora_alpha": task["alpha"],
            "init_kl_coef": task["kl_coef"],
            "horizon": 10_000_000,
            "missing_eos_penalty": 0,
            "dtype": "float32",
            "save_steps": 1000,
        }
        asked = parse_method({"type": "ppo", "ppo": {"hyperparameters": wanted}}, None)
        return RunSpec(
            job_id="ftjob-benchmark",
            attempt=1,
            method="ppo",
            hyperparameters=resolve(asked, n_examples=len(questions), seed=task["seed"]),
            seed=task["seed"],
            model_dir=models / "base",
            model_id=task["model"],
            reward_model_dir=models / "reward",
            reward_adapter_dir=models / "reward-adapter",
            train_file=run_dir / "train",
            cache_dir=self._folder / "cache",
        )


def choose_questions(task: dict[str, Any]) -> list[str]:
    """At least a batch: of less than one, TRL waits for ever."""
    return QUESTIONS * max(1, task["batch"] // len(QUESTIONS))


def _environment() -> dict[str, str]:
    ours = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | ours | {"OMP_NUM_THREADS": str(THREADS)}


def compare_cost(runs: Runs, *, pairs: int, updates: int) -> dict[str, Any]:
    """Peak memory and updates a second, by turns; the ratios are ours over theirs, pair by pair."""
    rows = []
    for pair in range(pairs):
        task = SPEED | {"updates": updates, "seed": pair + 1}
        ours, theirs = runs.ours(task), runs.theirs(task)
        figures = ("peak_mib", "update_s", "update_cpu_s")
        rows.append(
            {
                "ours": {name: round(ours[name], 2) for name in figures},
                "theirs": {name: round(theirs[name], 2) for name in figures},
                "memory_ratio": round(ours["peak_mib"] / theirs["peak_mib"], 3),
                "speed_ratio": round(theirs["update_s"] / ours["update_s"], 2),
                "cpu_speed_ratio": round(theirs["update_cpu_s"] / ours["update_cpu_s"], 2),
                "load": round(os.getloadavg()[0], 1),
            }
        )
        sys.stderr.write(f"{rows[-1]}\n")
    return {
        "task": SPEED | {"updates": updates},
        "pairs": rows,
        **{
            name: spread([row[name] for row in rows])
            for name in ("memory_ratio", "speed_ratio", "cpu_speed_ratio")
        },
        "targets": {"memory_ratio_at_most": MEMORY_TARGET, "speed_ratio_at_least": SPEED_TARGET},
    }


def spread(numbers: list[float]) -> dict[str, float]:
    return {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}


def compare_rewards(runs: Runs, *, seeds: int) -> dict[str, Any]:
    """The mean score of either at the same distances from the reference, for each seed."""
    found: dict[str, list[Any]] = {"ours": [], "theirs": []}
    for seed in range(1, seeds + 1):
        for name, start in (("ours", runs.ours), ("theirs", runs.theirs)):
            found[name].append(start(CURVE | {"seed": seed})["updates"])
            last = found[name][-1][-1]
            sys.stderr.write(f"seed {seed}, {name}: reward {last['reward']:.2f} at KL {last['kl']:.2f}\n")
    reached = min(max(update["kl"] for update in run) for each in found.values() for run in each)
    levels = []
    for part in KL_LEVELS:
        at = {name: [reward_at(run, kl=part * reached) for run in each] for name, each in found.items()}
        row: dict[str, Any] = {"kl": round(part * reached, 3)}
        for name, rewards in at.items():
            row[name] = {"seeds": [round(r, 3) for r in rewards], "mean": round(statistics.mean(rewards), 3)}
        levels.append(row)
    start = {
        name: round(statistics.mean(run[0]["reward"] for run in each), 3) for name, each in found.items()
    }
    return {"task": CURVE, "kl": "nats, summed over an answer", "reward_at_start": start, "levels": levels}


def reward_at(updates: list[dict[str, float]], *, kl: float) -> float:
    """The reward where the run first gets so far, between the updates before and after."""
    for before, after in pairwise(updates):
        if before["kl"] <= kl <= after["kl"]:
            part = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return before["reward"] + part * (after["reward"] - before["reward"])
    raise ValueError(f"this run never reaches a KL of {kl}")


if __name__ == "__main__":
    main()
