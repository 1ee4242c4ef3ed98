"""Service tax: step time of a job under the service over that of the same RUN_DIR run by hand, in turn.

`python benchmarks/step_tax.py [--pairs 3] [--steps 60] [--out FILE]` starts a service of its own on a small
random model. Steps 10 to the end count; the median of a run is one figure. The loss curves must be equal.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.stack import Stack, start_stack, wait_for  # noqa: E402
from tests.tiny import build_model, chat_rows  # noqa: E402

WARM_UP_STEPS = 10
TERMINAL = ("succeeded", "failed", "cancelled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), pairs=options.pairs, steps=options.steps)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure(folder: Path, *, pairs: int, steps: int) -> dict[str, Any]:
    """Run `pairs` jobs, each followed by the same run by hand; ratios of their median step times."""
    model, data = folder / "model", folder / "chat.jsonl"
    build_model(model)
    data.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(256)))
    stack = start_stack(folder / "home", import_dirs=[folder])
    rows = []
    try:
        stack.import_model(model, model_id="tiny")
        file_id = upload(stack, data)
        for pair in range(pairs):
            run_dir = run_job(stack, file_id, steps=steps)
            by_hand = repeat_by_hand(run_dir, folder / f"by-hand-{pair}")
            service, hand = read_steps(run_dir), read_steps(by_hand)
            rows.append(
                {
                    "service_ms": round(1000 * median_step_s(service), 3),
                    "by_hand_ms": round(1000 * median_step_s(hand), 3),
                    "ratio": round(median_step_s(service) / median_step_s(hand), 4),
                    "equal_losses": [s["train_loss"] for s in service] == [s["train_loss"] for s in hand],
                }
            )
            sys.stderr.write(f"{rows[-1]}\n")
    finally:
        stack.stop()
    ratios = [row["ratio"] for row in rows]
    return {
        "benchmark": "step_tax",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "steps": steps,
        "pairs": rows,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def upload(stack: Stack, data: Path) -> str:
    """The id of the checked file."""
    client = stack.sdk()
    with data.open("rb") as source:
        file = client.files.create(file=source, purpose="fine-tune")
    return client.files.wait_for_processing(file.id, poll_interval=0.2).id


def run_job(stack: Stack, file_id: str, *, steps: int) -> Path:
    """Run one job to its end; its run folder."""
    client = stack.sdk()
    hyperparameters = {
        "n_epochs": 50,
        "max_steps": steps,
        "batch_size": 16,
        "micro_batch_size": 16,
        "max_length": 256,
        "logging_steps": 1,
        "save_steps": 100_000,
    }
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file_id,
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
    )
    status = wait_for(
        lambda: status if (status := client.fine_tuning.jobs.retrieve(job.id).status) in TERMINAL else None,
        within_s=600,
        what="the end of the job",
        every_s=1.0,
    )
    assert status == "succeeded", status
    return stack.home / "runs" / job.id / "1"


def repeat_by_hand(run_dir: Path, target: Path) -> Path:
    """`torchrun -m trainers.run` on a copy of the run's spec, with nothing of ours around it."""
    target.mkdir()
    shutil.copy(run_dir / "spec.json", target)
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    env = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "TOKENIZERS_PARALLELISM": "false"}
    with (target / "log.txt").open("wb") as log:
        subprocess.run(
            [*argv, "-m", "trainers.run", str(target)], env=env, stdout=log, stderr=log, check=True
        )
    return target


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of every training step."""
    records = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [r["data"] for r in records if r["type"] == "metrics" and "step_time_s" in r["data"]]


def median_step_s(steps: list[dict[str, Any]]) -> float:
    """Median over the steps after the warm-up."""
    return statistics.median(step["step_time_s"] for step in steps[WARM_UP_STEPS:])


if __name__ == "__main__":
    main()
