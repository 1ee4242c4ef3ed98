"""The methods on one GPU over HTTP: pretraining, supervised, then reward and dpo, on a 1B shape in bf16.

`python benchmarks/gpu_methods.py --out FILE` starts its own service on a random model with 1 billion weights
and a tiny vocabulary, submits the four jobs, chats with the last result, and writes what each step took.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.contracts.test_methods import Service, preferences  # noqa: E402
from tests.stack import start_stack  # noqa: E402
from tests.tiny import build_tokenizer, chat_rows  # noqa: E402

SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "batch_size": 16, "n_epochs": 2, "learning_rate": 2e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"], help="smaller for a rehearsal")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), shape=SHAPE | {"hidden_size": options.hidden})
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(folder: Path, *, shape: dict[str, int]) -> dict[str, Any]:
    """Run the four jobs; the figures of each."""
    parameters = build(folder / "model", shape)
    stack = start_stack(
        folder / "home",
        import_dirs=[folder],
        RESIDENCY_GPUS="auto",
        RESIDENCY_LEASE_TTL_S="60",
        RESIDENCY_HEARTBEAT_S="2",
    )
    jobs: dict[str, Any] = {}
    try:
        stack.import_model(folder / "model", model_id="tiny")
        with stack.http() as http:
            service = Service(http)
            for name, job in run_chain(service):
                jobs[name] = describe(service, job)
                print(name, json.dumps(jobs[name]), flush=True)
            answer = ask(service, jobs["dpo"]["model"])
    except AssertionError:
        for log in sorted((folder / "home" / "runs").rglob("*.log")) + sorted(
            (folder / "home" / "runs").rglob("log.txt")
        ):
            print(log, log.read_text()[-3000:], sep="\n")
        raise
    finally:
        stack.stop()
    return {
        "benchmark": "gpu_methods",
        "gpu": gpu_name(),
        "versions": versions(),
        "parameters": parameters,
        "jobs": jobs,
        "chat": answer,
    }


def build(folder: Path, shape: dict[str, int]) -> int:
    """A random llama in bf16; its number of weights."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    build_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        **shape,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def run_chain(service: Service) -> Any:
    """Yields each job as it has succeeded."""
    text = "".join(f"Aspirin thins the blood. Case {n}: {n % 7} tablets were taken.\n" for n in range(600))
    job = service.train("pretraining", "tiny", service.upload("corpus.txt", text), block_size=256, **SETTINGS)
    yield "pretraining", job
    rows = service.upload_rows(chat_rows(256))
    job = service.train("supervised", job["fine_tuned_model"], rows, max_length=256, **SETTINGS)
    yield "supervised", job
    pairs = service.upload_rows(preferences(256))
    yield "reward", service.train("reward", job["fine_tuned_model"], pairs, max_length=256, **SETTINGS)
    yield "dpo", service.train("dpo", job["fine_tuned_model"], pairs, max_length=256, **SETTINGS)


def describe(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    """What a job took, and what its trainer and its merge said."""
    events = service.http.get(f"/fine_tuning/jobs/{job['id']}/events?limit=1000").json()["data"]
    told: dict[str, Any] = {}
    for event in events:
        told |= {key: event["data"][key] for key in ("exit", "merge") if key in event["data"]}
        if event["data"].get("code") == "configured":
            told["configured"] = event["message"]
    steps = [e["data"]["step_time_s"] for e in events if "step_time_s" in e["data"]]
    return {
        "model": job["fine_tuned_model"],
        "wall_s": job["finished_at"] - job["created_at"],
        "median_step_s": sorted(steps)[len(steps) // 2],
        **told,
    }


def ask(service: Service, model: str) -> dict[str, Any]:
    """A chat with the last result, and how long its engine took to come up."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "How is case 3 treated?"}],
        "max_tokens": 32,
    }
    began = time.perf_counter()
    while (answer := service.http.post("/chat/completions", json=body)).status_code == 503:
        assert time.perf_counter() - began < 180, answer.text
    assert answer.status_code == 200, answer.text
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    assert service.http.post("/chat/completions", json=body).status_code == 200
    again_s = time.perf_counter() - began
    return {"first_s": round(first_s, 2), "again_s": round(again_s, 3), "usage": answer.json()["usage"]}


def gpu_name() -> str | None:
    """The card, as its driver names it."""
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or None


def versions() -> dict[str, str]:
    """The libraries that did the work."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "accelerate")} | {
        "cpus": str(os.cpu_count())
    }


if __name__ == "__main__":
    main()
