"""What a GPU adds to recovery: exact enough resume in fp16, memory given back, too little memory, strangers.

`python benchmarks/gpu_recovery.py [--out FILE]` starts its own service on a random model with 1 billion
weights and a tiny vocabulary. A run in fp16 is paused and resumed and compared with one that was not;
trainers are killed and cancelled, and the driver tells when their memory is free; a job that asks for too
many rows at once halves them; a GPU that somebody else computes on is kept from jobs. Without a GPU it
rehearses the first three parts.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_methods import SHAPE, build, gpu_name, versions  # noqa: E402
from tests.contracts.test_methods import Service  # noqa: E402
from tests.stack import Stack, processes_of, start_stack, wait_for  # noqa: E402
from tests.tiny import chat_rows  # noqa: E402
from workers.gpus import list_gpus, read_uses  # noqa: E402

HERE = "cuda:0"
SLACK_BYTES = 100 << 20  # over what was in use before
LIMIT_S = 300
SETTINGS: dict[str, Any] = {
    "batch_size": 16,
    "n_epochs": 1,
    "learning_rate": 2e-4,
    "logging_steps": 1,
    "save_steps": 1000,
    "max_length": 128,
}
STRANGER = """
import sys, torch
held = torch.ones(2 << 30, dtype=torch.uint8, device="cuda")
print("here", flush=True)
sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"], help="smaller for a rehearsal")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--parts", nargs="+", default=[name for name, _ in PARTS], help="some of them")
    options = parser.parse_args()
    has_gpu = bool(list_gpus())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = SHAPE | {"hidden_size": options.hidden, "num_hidden_layers": options.layers}
        parameters = build(folder / "model", shape | {"intermediate_size": 4 * options.hidden})
        stack = start_stack(
            folder / "home",
            import_dirs=[folder],
            RESIDENCY_GPUS="auto" if has_gpu else "none",
            RESIDENCY_HEARTBEAT_S="1",
            RESIDENCY_LEASE_TTL_S="15",
        )
        try:
            result: dict[str, Any] = {
                "benchmark": "gpu_recovery",
                "gpu": gpu_name() if has_gpu else None,
                "versions": versions(),
                "parameters": parameters,
            }
            stack.import_model(folder / "model", model_id="tiny")
            parts = PARTS if has_gpu else PARTS[:3]
            with stack.http() as http:
                bench = Bench(stack, Service(http), n_steps=options.steps, has_gpu=has_gpu)
                for part, measure in parts:
                    if part not in options.parts:
                        continue
                    result[part] = measure(bench)
                    print(part, json.dumps(result[part]), flush=True)
                    if options.out:
                        options.out.write_text(json.dumps(result, indent=1) + "\n")
        finally:
            stack.stop()


class Bench:
    """A service with a training file, and what one asks of it here."""

    def __init__(self, stack: Stack, service: Service, *, n_steps: int, has_gpu: bool) -> None:
        self.stack, self.http, self._n_steps, self._has_gpu = stack, service.http, n_steps, has_gpu
        self._file = service.upload_rows(chat_rows(16 * n_steps))
        long = {"role": "assistant", "content": "rest and drink water " * 140}
        self._long_file = service.upload_rows(
            [{"messages": [{"role": "user", "content": f"Case {n}?"}, long]} for n in range(128)]
        )

    def start(self, *, is_long: bool = False, on_oom: str | None = None, **settings: Any) -> str:
        """Submit a supervised job; its id."""
        asked = {
            "batch_size": 16,
            "n_epochs": 1,
            "learning_rate": 2e-4,
            "logging_steps": 1,
            "max_length": 128,
        }
        asked |= {"dtype": "float16" if self._has_gpu else "float32", "save_steps": 1000} | settings
        body = {
            "model": "tiny",
            "seed": 5,
            "training_file": self._long_file if is_long else self._file,
            "method": {"type": "supervised", "supervised": {"hyperparameters": asked}},
        }
        made = self.http.post("/fine_tuning/jobs", json=body | ({"on_oom": on_oom} if on_oom else {}))
        assert made.status_code == 200, made.text
        return made.json()["id"]

    def curve(self, job_id: str) -> dict[int, float]:
        """The training loss by step."""
        curves = self.http.get(f"/fine_tuning/jobs/{job_id}/curves", params={"max_points": 2000}).json()
        loss = curves["series"].get("train_loss") or {"steps": [], "values": []}
        return dict(zip(loss["steps"], loss["values"], strict=True))

    def see(self, job_id: str) -> dict[str, Any]:
        """The job."""
        return self.http.get(f"/fine_tuning/jobs/{job_id}").json()

    def until(self, job_id: str, *states: str) -> dict[str, Any]:
        """The job, once it is in one of these states."""

        def there() -> dict[str, Any] | None:
            job = self.see(job_id)
            assert job["status"] in states or job["status"] not in ("failed", "cancelled"), job["error"]
            return job if job["status"] in states else None

        job = wait_for(there, within_s=LIMIT_S, what=f"a job that is {' or '.join(states)}")
        assert job
        return job

    def until_step(self, job_id: str, step: int) -> None:
        """Wait until a job has measured so many steps."""
        wait_for(lambda: len(self.curve(job_id)) >= step, within_s=LIMIT_S, what=f"step {step}")

    def until_freed(self, limit_bytes: int, *, since: float) -> float | None:
        """Seconds until the GPU's memory was back; None without a GPU."""
        if not self._has_gpu:
            return None
        wait_for(lambda: used_bytes() <= limit_bytes, within_s=15, what="the memory of a GPU", every_s=0.02)
        return round(time.monotonic() - since, 2)

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """What happened, oldest first, without the numbers of the steps."""
        asked = {"limit": 1000, "type": "message"}
        found = self.http.get(f"/fine_tuning/jobs/{job_id}/events", params=asked).json()["data"]
        return [event for event in reversed(found) if event["type"] == "message"]


def used_bytes() -> int:
    """Memory of the GPU that is in use, as the driver tells; 0 without one."""
    uses = read_uses()
    return uses[HERE].memory_used_bytes if HERE in uses else 0


def resume(bench: Bench) -> dict[str, Any]:
    """One run as it is, and one that is paused and resumed: how far their losses are apart."""
    whole = bench.start()
    bench.until(whole, "succeeded")
    broken = bench.start()
    bench.until_step(broken, 8)
    bench.http.post(f"/fine_tuning/jobs/{broken}/pause")
    bench.until(broken, "paused")
    at = max(bench.curve(broken))
    saved = sorted({path.name for path in (bench.stack.home / "runs" / broken).rglob("scaler.pt")})
    bench.http.post(f"/fine_tuning/jobs/{broken}/resume")
    bench.until(broken, "succeeded")
    first, second = bench.curve(whole), bench.curve(broken)
    assert first.keys() == second.keys()
    apart = [abs(first[step] - second[step]) / abs(first[step]) for step in first]
    return {
        "steps": len(first),
        "paused_at_step": at,
        "scaler_saved": bool(saved),
        "first_loss": first[min(first)],
        "last_loss": first[max(first)],
        "most_apart": max(apart),
        "equal_bit_for_bit": first == second,
    }


def kill(bench: Bench) -> dict[str, Any]:
    """SIGKILL to a trainer: its memory is free, and the next attempt brings the job to its end."""
    before = used_bytes()
    job = bench.start(save_steps=10)
    bench.until_step(job, 12)
    during = used_bytes()
    trainer = next(p for p in processes_of(bench.stack.home) if is_trainer(p.cmdline(), job))
    began = time.monotonic()
    os.kill(trainer.pid, signal.SIGKILL)
    freed_s = bench.until_freed(before + SLACK_BYTES, since=began)
    bench.until(job, "succeeded")
    resumed = [event["message"] for event in bench.events(job) if "Resuming" in event["message"]]
    return {"before_bytes": before, "during_bytes": during, "freed_after_s": freed_s, "resumed": resumed}


def is_trainer(line: list[str], job_id: str) -> bool:
    """Whether a command line is that of a rank of this job."""
    return "trainers.run" in line and "torch.distributed.run" not in line and job_id in line[-1]


def cancel(bench: Bench) -> dict[str, Any]:
    """A cancel of a running job: its memory is free."""
    before = used_bytes()
    job = bench.start()
    bench.until_step(job, 8)
    began = time.monotonic()
    bench.http.post(f"/fine_tuning/jobs/{job}/cancel")
    bench.until(job, "cancelled")
    cancelled_s = round(time.monotonic() - began, 2)
    freed_s = bench.until_freed(before + SLACK_BYTES, since=began)
    return {"cancelled_after_s": cancelled_s, "freed_after_s": freed_s}


def lack_memory(bench: Bench) -> dict[str, Any]:
    """More rows at once than fit: they are halved until they do, with the same batch."""
    job = bench.start(
        is_long=True,
        on_oom="halve_batch",
        batch_size=128,
        micro_batch_size=128,
        max_length=2048,
        max_steps=1,
        gradient_checkpointing=False,
        dtype="bfloat16",
    )
    done = bench.until(job, "succeeded")
    codes = [event["message"] for event in bench.events(job) if "memory" in event["message"]]
    resolved = done["method"]["supervised"]["hyperparameters"]
    return {
        "told": codes,
        "batch_size": resolved["batch_size"],
        "micro_batch_size": resolved["micro_batch_size"],
    }


def meet_a_stranger(bench: Bench) -> dict[str, Any]:
    """Somebody else computes on the GPU: no job gets it until they are gone."""
    stranger = subprocess.Popen(
        [sys.executable, "-c", STRANGER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert stranger.stdout
    assert stranger.stdout.readline() == "here\n"
    job = bench.start(max_steps=2)

    def device() -> dict[str, Any]:
        return bench.http.get("/nodes").json()["data"][0]["devices"][0]

    def kept() -> dict[str, Any] | None:
        found = device()
        return found if found["state"] == "quarantined" else None

    told = wait_for(kept, within_s=60, what="the quarantine")
    assert told
    blocked = bench.see(job)["blocked_by"]
    stranger.communicate("")
    bench.until(job, "succeeded")
    return {"reason": told["reason"], "blocked_by": blocked, "afterwards": device()["state"]}


PARTS: list[tuple[str, Callable[[Bench], Any]]] = [
    ("resumed", resume),
    ("killed", kill),
    ("cancelled", cancel),
    ("too_little_memory", lack_memory),
    ("stranger", meet_a_stranger),
]

if __name__ == "__main__":
    main()
