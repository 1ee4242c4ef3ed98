"""A pipeline of every stage on the whole service: submitted once, carried out by real workers."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.contracts.test_methods import Service, preferences
from tests.stack import Stack, wait_for
from tests.tiny import chat_rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
QUICK = {"learning_rate": 5e-3, "batch_size": 8, "max_steps": 3}
WORDS = (
    "dyspnoea haematuria tachycardia ischaemia hyponatraemia "
    "ketoacidosis thyrotoxicosis osteoporosis jaundice"
).split()
NEW_TOKENS = 60  # more than the tiny model has spare rows
QUESTION = {"messages": [{"role": "user", "content": "How is case 3 treated?"}], "max_tokens": 8}


def stage(name: str, model: Any, file: str, method: str, **settings: Any) -> dict:
    hyperparameters = QUICK | settings
    return {
        "name": name,
        "model": model,
        "training_file": file,
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
    }


def all_stages(service: Service, *, nproc_per_node: int) -> list[dict]:
    text = "".join(f"Case {n}: {WORDS[n % 9]}, then {WORDS[n % 4]}; {n % 7} tablets.\n" for n in range(80))
    prompts = service.upload_rows([{"question": f"How is case {n} treated?"} for n in range(32)])
    pairs, chats = service.upload_rows(preferences(48)), service.upload_rows(chat_rows(48))
    tuned = {"stage": "sft"}
    stages = [
        stage(
            "pt",
            "tiny",
            service.upload("corpus.txt", text),
            "pretraining",
            block_size=64,
            new_tokens=NEW_TOKENS,
        ),
        stage("sft", {"stage": "pt"}, chats, "supervised", max_length=128),
        stage("rm", tuned, pairs, "reward", max_length=256),
        stage(
            "rl",
            tuned,
            prompts,
            "ppo",
            reward_model={"stage": "rm"},
            max_length=128,
            output_max_length=16,
        ),
        stage("dpo", tuned, pairs, "dpo", max_length=256),
    ]
    for one in stages:
        one["resources"] = {"nproc_per_node": nproc_per_node}
    return stages


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model's folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("nproc_per_node", [1, 2])
def test_all_stages_in_one_submission(stack: Stack, nproc_per_node: int) -> None:
    with stack.http() as http:
        stages = all_stages(Service(http), nproc_per_node=nproc_per_node)
        body = {"name": "medical", "stages": stages}
        made = http.post("/pipelines", json=body)
        assert made.status_code == 200, made.text
        path = f"/pipelines/{made.json()['id']}"

        def over() -> dict | None:
            pipeline = http.get(path).json()
            return pipeline if pipeline["status"] in ("succeeded", "failed", "cancelled") else None

        done = wait_for(over, within_s=900, what="the pipeline")
        assert done["status"] == "succeeded", done["stages"]
        results = {found["name"]: found["fine_tuned_model"] for found in done["stages"]}
        models = {model["id"]: model for model in http.get("/models").json()["data"]}
        assert {name: models[result]["parent"] for name, result in results.items()} == {
            "pt": "tiny",
            "sft": results["pt"],
            "rm": results["sft"],
            "rl": results["sft"],
            "dpo": results["sft"],
        }
        for name in results:
            check_merge(stack, results[name], parent=models[results[name]]["parent"])

        for aligned in (results["rl"], results["dpo"]):
            answer = http.post("/chat/completions", json=QUESTION | {"model": aligned})
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["role"] == "assistant"

        again = http.post("/pipelines", json=body).json()
        assert again["status"] == "succeeded"
        assert again["stages"] == [found | {"reused": True} for found in done["stages"]]


def check_merge(stack: Stack, model: str, *, parent: str) -> None:
    """The merged model is its parent's equal in all but what was learnt: no adapter, dtype, no fewer rows."""
    merged, before = (read_weights(find_folder(stack, name)) for name in (model, parent))
    assert not [name for name in merged if "lora_" in name]
    shared = merged.keys() & before.keys()
    assert before.keys() - merged.keys() <= {"lm_head.weight"}  # of a reward model
    assert {name: merged[name].dtype for name in shared} == {name: before[name].dtype for name in shared}
    assert any(not torch.equal(merged[name], before[name][: len(merged[name])]) for name in shared)
    rows = [tensors["model.embed_tokens.weight"].shape[0] for tensors in (before, merged)]
    assert rows[1] > rows[0] if parent == "tiny" else rows[1] == rows[0]


def find_folder(stack: Stack, model: str) -> Path:
    """Where the service keeps a model."""
    with sqlite3.connect(f"file:{stack.home / 'residency.db'}?mode=ro", uri=True) as database:
        (path,) = database.execute("SELECT path FROM models WHERE id = ?", (model,)).fetchone()
    return Path(path)
