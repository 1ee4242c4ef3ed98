"""A pipeline of four stages on the whole service: submitted once, carried out by real workers."""

from typing import Any

import pytest

from tests.contracts.test_methods import Service, preferences
from tests.stack import Stack, wait_for
from tests.tiny import chat_rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
QUICK = {"learning_rate": 5e-3, "batch_size": 8, "max_steps": 3}


def stage(name: str, model: Any, file: str, method: str, **settings: Any) -> dict:
    hyperparameters = QUICK | settings
    return {
        "name": name,
        "model": model,
        "training_file": file,
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
    }


def four_stages(service: Service) -> list[dict]:
    text = "".join(f"Aspirin thins the blood. Case {n}: {n % 7} tablets were taken.\n" for n in range(80))
    prompts = service.upload_rows([{"question": f"How is case {n} treated?"} for n in range(32)])
    pairs, chats = service.upload_rows(preferences(48)), service.upload_rows(chat_rows(48))
    tuned = {"stage": "sft"}
    return [
        stage("pt", "tiny", service.upload("corpus.txt", text), "pretraining", block_size=64),
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
    ]


def test_four_stages_in_one_submission(stack: Stack) -> None:
    with stack.http() as http:
        body = {"name": "medical", "stages": four_stages(Service(http))}
        made = http.post("/pipelines", json=body)
        assert made.status_code == 200, made.text
        path = f"/pipelines/{made.json()['id']}"

        def over() -> dict | None:
            pipeline = http.get(path).json()
            return pipeline if pipeline["status"] in ("succeeded", "failed", "cancelled") else None

        done = wait_for(over, within_s=600, what="the pipeline")
        assert done["status"] == "succeeded", done["stages"]
        results = {found["name"]: found["fine_tuned_model"] for found in done["stages"]}
        models = {model["id"]: model for model in http.get("/models").json()["data"]}
        assert {name: models[result]["parent"] for name, result in results.items()} == {
            "pt": "tiny",
            "sft": results["pt"],
            "rm": results["sft"],
            "rl": results["sft"],
        }

        again = http.post("/pipelines", json=body).json()
        assert again["status"] == "succeeded"
        assert again["stages"] == [found | {"reused": True} for found in done["stages"]]
