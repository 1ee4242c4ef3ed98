"""The four-stage pipeline on GPUs over HTTP: pretraining, supervised, reward, ppo on a 1B shape in bf16.

`python benchmarks/gpu_methods.py --out FILE` starts its own service on a random model with 1 billion weights
and a tiny vocabulary, submits one pipeline, chats with its last model, and writes what each stage took. A
stage has one GPU. `--stages pt sft preferred graded` goes on with dpo and grpo in place of reward and ppo.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.contracts.test_methods import Service, preferences  # noqa: E402
from tests.stack import start_stack  # noqa: E402
from tests.tiny import build_tokenizer, chat_rows  # noqa: E402
from workers.gpus import list_gpus  # noqa: E402

SHAPE = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}
SETTINGS: dict[str, Any] = {
    "max_validation_overlap": 1,
    "max_eval_samples": 32,
    "dtype": "bfloat16",
    "batch_size": 16,
    "n_epochs": 1,
    "learning_rate": 2e-4,
}
ANSWERS = {"max_length": 128, "output_max_length": 32, "max_steps": 8}
GRADER = {
    "type": "text_similarity",
    "input": "{{sample.output_text}}",
    "reference": "Give {{item.tablets}} tablets of aspirin a day.",
    "evaluation_metric": "fuzzy_match",
}
POLL_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"], help="smaller for a rehearsal")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--stages", nargs="+", default=["pt", "sft", "rm", "rl"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPE | {"hidden_size": options.hidden, "num_hidden_layers": options.layers}
        shape["intermediate_size"] = 4 * options.hidden
        result = measure(Path(folder), shape=shape, names=options.stages, out=options.out)
    print(json.dumps(result, indent=1))


def measure(folder: Path, *, shape: dict[str, int], names: list[str], out: Path) -> dict[str, Any]:
    """Run the pipeline; the figures of each stage, written as they come."""
    result: dict[str, Any] = {
        "benchmark": "gpu_methods",
        "gpu": gpu_name(),
        "versions": versions(),
        "parameters": build(folder / "model", shape),
        "stages": {},
    }
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
            for name, job in run_pipeline(service, names):
                result["stages"][name] = describe(service, job, runs=folder / "home" / "runs")
                print(name, json.dumps(result["stages"][name]), flush=True)
                out.write_text(json.dumps(result, indent=1) + "\n")
            result["chat"] = ask(service, result["stages"][names[-1]]["model"])
    except AssertionError:
        for log in sorted((folder / "home" / "runs").rglob("log.txt")):
            print(log, log.read_text()[-3000:], sep="\n")
        raise
    finally:
        stack.stop()
    out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def build(folder: Path, shape: dict[str, int]) -> int:
    """`_build` in a process of its own: a GPU that somebody holds memory of would be quarantined."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_build, folder, shape).result()


def _build(folder: Path, shape: dict[str, int]) -> int:
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


def run_pipeline(service: Service, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Submits these stages at once; yields each stage's name and job as it has succeeded.

    A stage whose upstream is left out begins with the base.
    """
    text = "".join(f"Aspirin thins the blood. Case {n}: {n % 7} tablets were taken.\n" for n in range(600))
    chats, pairs = service.upload_rows(chat_rows(256)), service.upload_rows(preferences(256))
    prompts = service.upload_rows(
        [{"question": f"How is case {n} treated?", "tablets": str(n % 9)} for n in range(128)]
    )
    tuned = {"stage": "sft"} if "sft" in names else "tiny"
    stages = [
        stage("pt", "tiny", service.upload("corpus.txt", text), "pretraining", block_size=256),
        stage("sft", {"stage": "pt"} if "pt" in names else "tiny", chats, "supervised", max_length=256),
        stage("rm", tuned, pairs, "reward", max_length=256),
        stage(
            "rl",
            tuned,
            prompts,
            "ppo",
            reward_model={"stage": "rm"},
            **ANSWERS,
        ),
        stage("preferred", tuned, pairs, "dpo", max_length=256),
        stage("graded", tuned, prompts, "grpo", num_generations=4, **ANSWERS),
    ]
    stages[-1]["method"]["grpo"]["grader"] = GRADER
    stages = [one for one in stages if one["name"] in names]
    for one in stages:
        one["validation_file"] = one["training_file"]
    made = service.http.post("/pipelines", json={"name": "gpu", "stages": stages})
    assert made.status_code == 200, made.text
    waiting = [one["name"] for one in stages]
    while waiting:
        found = service.http.get(f"/pipelines/{made.json()['id']}").json()
        assert found["status"] not in ("failed", "cancelled"), found
        jobs = {one["name"]: one["job_id"] for one in found["stages"] if one["status"] == "succeeded"}
        for name in [name for name in waiting if name in jobs]:
            waiting.remove(name)
            yield name, service.http.get(f"/fine_tuning/jobs/{jobs[name]}").json()
        time.sleep(POLL_S)


def stage(name: str, model: Any, file: str, method: str, **settings: Any) -> dict[str, Any]:
    """A stage as the API wants it."""
    return {
        "name": name,
        "model": model,
        "training_file": file,
        "method": {"type": method, method: {"hyperparameters": SETTINGS | settings}},
    }


def keep(event: dict[str, Any]) -> dict[str, Any]:
    """An event as its log has it, without the ids of this service."""
    return {name: event[name] for name in ("created_at", "level", "type", "message", "data")}


def describe(service: Service, job: dict[str, Any], *, runs: Path) -> dict[str, Any]:
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
        "phase_s": phase_seconds(next(runs.glob(f"{job['id']}/*/events.jsonl"))),
        "median_step_s": sorted(steps)[len(steps) // 2],
        **told,
        "events": [keep(event) for event in reversed(events)],  # they come newest first
    }


def phase_seconds(events: Path) -> dict[str, float]:
    """How long a run spent in each phase, from its own events; the last phase ends with the last event."""
    told = [json.loads(line) for line in events.read_text().splitlines()]
    phases = [(event["ts"], event["phase"]) for event in told if event["type"] == "phase"]
    spent: dict[str, float] = {}
    for (began, name), (ended, _) in pairwise([*phases, (told[-1]["ts"], "")]):
        spent[name] = round(spent.get(name, 0.0) + ended - began, 2)
    return spent


def ask(service: Service, model: str) -> dict[str, Any]:
    """A chat with the last result, and how long its engine took to come up."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": chat_rows(4)[3]["messages"][0]["content"]}],
        "max_tokens": 32,
        "temperature": 0,
    }
    began = time.perf_counter()
    while (answer := service.http.post("/chat/completions", json=body)).status_code == 503:
        assert time.perf_counter() - began < 180, answer.text
    assert answer.status_code == 200, answer.text
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    assert service.http.post("/chat/completions", json=body).status_code == 200
    again_s = time.perf_counter() - began
    told = answer.json()
    text = told["choices"][0]["message"]["content"]
    assert text, told
    return {
        "first_s": round(first_s, 2),
        "again_s": round(again_s, 3),
        "answer": text,
        "usage": told["usage"],
    }


def gpu_name() -> str | None:
    """The card, as its driver names it."""
    gpus = list_gpus()
    return gpus[0].kind if gpus else None


def versions() -> dict[str, str]:
    """The libraries that did the work."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "accelerate")} | {
        "cpus": str(os.cpu_count())
    }


if __name__ == "__main__":
    main()
