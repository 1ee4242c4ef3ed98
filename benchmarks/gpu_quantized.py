"""Supervised runs in 4 bits, in 8 bits and under ZeRO over HTTP, each trained, merged and verified.

`python benchmarks/gpu_quantized.py --out DIR` starts its own service on a random model with 1 billion weights
and a tiny vocabulary, submits a plain run to compare with, one in 4 and one in 8 bits and, where there are
two GPUs, the same on both: plain, under ZeRO-2 and under ZeRO-3. DIR/gpu_quantized.json says what each took.
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_methods import SETTINGS, SHAPE, build, describe, gpu_name, versions  # noqa: E402
from tests.contracts.test_methods import Service  # noqa: E402
from tests.stack import start_stack, wait_for  # noqa: E402
from tests.tiny import chat_rows  # noqa: E402
from workers.gpus import list_gpus  # noqa: E402

LIMIT_S = 600
ALONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "4-bit": {"load_in_4bit": True},
    "8-bit": {"load_in_8bit": True},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "zero2 4-bit": {"deepspeed": "zero2", "load_in_4bit": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"], help="smaller for a rehearsal")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", nargs="+", default=[*ALONE, *TOGETHER], help="some of them")
    parser.add_argument("--ranks", type=int, default=min(2, len(list_gpus())))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options=options)
    print(json.dumps(result, indent=1))


def measure(folder: Path, *, options: argparse.Namespace) -> dict[str, Any]:
    """Train and merge one after the other; the figures of each, written as they come."""
    shape = SHAPE | {"hidden_size": options.hidden, "num_hidden_layers": options.layers}
    result: dict[str, Any] = {
        "benchmark": "gpu_quantized",
        "gpu": gpu_name(),
        "versions": versions()
        | {name: version(name) for name in ("bitsandbytes", "deepspeed") if find_spec(name)},
        "parameters": build(folder / "model", shape | {"intermediate_size": 4 * options.hidden}),
        "runs": {},
    }
    runs = {name: (1, settings) for name, settings in ALONE.items()}
    if options.ranks >= 2:
        runs |= {name: (options.ranks, settings) for name, settings in TOGETHER.items()}
    runs = {name: run for name, run in runs.items() if name in options.runs}
    stack = start_stack(
        folder / "home",
        import_dirs=[folder],
        RESIDENCY_GPUS="auto",
        RESIDENCY_LEASE_TTL_S="60",
        RESIDENCY_HEARTBEAT_S="2",
    )
    try:
        stack.import_model(folder / "model", model_id="tiny")
        with stack.http() as http:
            service = Service(http)
            file = service.upload_rows(chat_rows(options.rows))
            for name, (ranks, settings) in runs.items():
                job = train(service, file, ranks=ranks, max_steps=options.steps, **settings)
                result["runs"][name] = {"ranks": ranks} | figures(service, job, home=folder / "home")
                print(name, json.dumps(result["runs"][name]), flush=True)
                (options.out / "gpu_quantized.json").write_text(json.dumps(result, indent=1) + "\n")
    except AssertionError:
        for log in sorted((folder / "home" / "runs").rglob("log.txt")):
            print(log, log.read_text()[-3000:], sep="\n")
        raise
    finally:
        stack.stop()
    return result


def train(service: Service, file: str, *, ranks: int, **settings: Any) -> dict[str, Any]:
    """A supervised job, trained and merged."""
    wish = {"hyperparameters": SETTINGS | {"max_length": 256} | settings}
    body = {
        "model": "tiny",
        "training_file": file,
        "validation_file": file,
        "resources": {"nproc_per_node": ranks},
        "method": {"type": "supervised", "supervised": wish},
    }
    made = service.http.post("/fine_tuning/jobs", json=body)
    assert made.status_code == 200, made.text

    def over() -> dict[str, Any] | None:
        job = service.http.get(f"/fine_tuning/jobs/{made.json()['id']}?wait=30").json()
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    job = wait_for(over, within_s=LIMIT_S, what=f"a job with {settings}")
    assert job
    assert job["status"] == "succeeded", job["error"]
    return job


def figures(service: Service, job: dict[str, Any], *, home: Path) -> dict[str, Any]:
    """What the job took; the merge must have verified what the run learned."""
    told = describe(service, job, runs=home / "runs")
    for event in told["events"]:
        if "peak_gpu_bytes" in event["data"]:
            told["peak_gpu_bytes"] = event["data"]["peak_gpu_bytes"]
    metrics = told["exit"]["metrics"]
    assert metrics["valid_loss"] < metrics["valid_loss_before"], metrics
    assert told["merge"]["adapter_rel_effect"] > 0, told["merge"]
    return told


if __name__ == "__main__":
    main()
