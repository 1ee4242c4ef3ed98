"""The methods through REST: each stage starts from the merged result of the one before."""

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.stack import Stack, wait_for
from tests.tiny import chat_rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
LORA = {"learning_rate": 5e-3, "batch_size": 8, "n_epochs": 3}
KNOWN = {"max_validation_overlap": 1}  # the same file tells what was learnt
ANSWERS = {"eval_max_tokens": 8}  # a reward model takes none


def preferences(count: int) -> list[dict]:
    choose = random.Random(0)
    return [
        {
            "question": f"How is case {choose.randrange(900)} treated?",
            "response_chosen": f"Give {choose.randrange(1, 9)} tablets of aspirin a day.",
            "response_rejected": f"That is hard to say in case {choose.randrange(900)}.",
        }
        for _ in range(count)
    ]


def label(pairs: list[dict]) -> list[dict]:
    """The answers of pairs, each found good or bad."""
    return [
        {"prompt": row["question"], "completion": row[key], "label": key == "response_chosen"}
        for row in pairs
        for key in ("response_chosen", "response_rejected")
    ]


class Service:
    """What a user does over and over."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def upload(self, name: str, text: str) -> str:
        answer = self.http.post("/files", data={"purpose": "fine-tune"}, files={"file": (name, text)})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def upload_rows(self, rows: list[dict]) -> str:
        return self.upload("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def train(
        self, method: str, model: str, file: str, *, grader: dict | None = None, **settings: Any
    ) -> dict:
        beside = {"grader": grader} if grader else {}
        more = {} if method == "reward" else ANSWERS
        body = {
            "model": model,
            "training_file": file,
            "validation_file": file,
            "suffix": method[:4],
            "method": {"type": method, method: {"hyperparameters": LORA | KNOWN | more | settings, **beside}},
        }
        made = self.http.post("/fine_tuning/jobs", json=body)
        assert made.status_code == 200, made.text

        def over() -> dict | None:
            job = self.http.get(f"/fine_tuning/jobs/{made.json()['id']}?wait=30").json()
            return job if job["status"] in ("succeeded", "failed", "cancelled") else None

        job = wait_for(over, within_s=500, what=f"the {method} job")
        assert job["status"] == "succeeded", job["error"]
        return job

    def metrics(self, job: dict) -> dict[str, float]:
        """What the trainer reported at its end."""
        events = self.http.get(f"/fine_tuning/jobs/{job['id']}/events?limit=1000").json()["data"]
        return next(event["data"]["exit"]["metrics"] for event in events if "exit" in event["data"])


@pytest.fixture(scope="module")
def service(stack: Stack) -> Iterator[Service]:
    with stack.http() as http:
        yield Service(http)


def test_from_plain_text_to_an_aligned_model_that_answers(service: Service) -> None:
    text = "".join(f"Aspirin thins the blood. Case {n}: {n % 7} tablets were taken.\n" for n in range(80))
    pretrained = service.train("pretraining", "tiny", service.upload("corpus.txt", text), block_size=64)
    metrics = service.metrics(pretrained)
    assert metrics["valid_loss"] < metrics["valid_loss_before"]

    tuned = service.train(
        "supervised", pretrained["fine_tuned_model"], service.upload_rows(chat_rows(48)), max_length=128
    )
    pairs = service.upload_rows(preferences(48))
    judge = service.train("reward", tuned["fine_tuned_model"], pairs, max_length=256)
    assert service.metrics(judge)["valid_accuracy"] > 0.9
    aligned = service.train("dpo", tuned["fine_tuned_model"], pairs, max_length=256, learning_rate=1e-3)
    assert service.metrics(aligned)["valid_margin"] > 0
    answers = service.upload_rows(label(preferences(48)))
    judged = service.train("kto", tuned["fine_tuned_model"], answers, max_length=256, learning_rate=1e-3)
    assert service.metrics(judged)["valid_margin"] > 0

    prompts = service.upload_rows([{"question": f"How is case {n} treated?"} for n in range(32)])
    rewarded = service.train(
        "ppo",
        tuned["fine_tuned_model"],
        prompts,
        reward_model=judge["fine_tuned_model"],
        max_length=128,
        output_max_length=16,
        max_steps=3,
    )
    models = {model["id"]: model for model in service.http.get("/models").json()["data"]}
    jobs = (pretrained, tuned, judge, aligned, judged, rewarded)
    lineage = [models[job["fine_tuned_model"]]["parent"] for job in jobs]
    assert lineage == ["tiny", pretrained["fine_tuned_model"], *[tuned["fine_tuned_model"]] * 4]
    assert {models[job["fine_tuned_model"]]["root"] for job in jobs} == {"tiny"}
    for job in jobs:
        model = service.http.get(f"/models/{job['fine_tuned_model']}").json()
        before, *_, after = model["evaluation"]["steps"]
        told = "pairs" if job is judge else "answers"
        count = 1 if job is pretrained else 3  # all lines of the text open alike
        assert (before["step"], len(before[told]), len(after[told])) == (0, count, count)
    question = {"messages": [{"role": "user", "content": "How is case 3 treated?"}], "max_tokens": 8}
    answer = service.http.post("/chat/completions", json=question | {"model": aligned["fine_tuned_model"]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"

    for refused, code in (
        (
            service.http.post("/chat/completions", json=question | {"model": judge["fine_tuned_model"]}),
            "model_not_chat",
        ),
        (
            service.http.post(
                "/fine_tuning/jobs", json={"model": judge["fine_tuned_model"], "training_file": pairs}
            ),
            "model_not_trainable",
        ),
        (
            service.http.post(
                "/fine_tuning/jobs",
                json={
                    "model": "tiny",
                    "training_file": prompts,
                    "method": {"type": "ppo", "ppo": {"hyperparameters": {"reward_model": "tiny"}}},
                },
            ),
            "not_a_reward_model",
        ),
        (
            service.http.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": pairs}),
            "invalid_training_file",
        ),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)


def test_a_grader_rewards_answers_and_what_a_row_lacks_for_it_is_told(service: Service) -> None:
    rows = [{"question": f"How is case {n} treated?", "answer": "rest"} for n in range(16)]
    grader = {
        "type": "text_similarity",
        "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}",
        "evaluation_metric": "fuzzy_match",
    }
    settings = {
        "batch_size": 16,
        "num_generations": 4,
        "output_max_length": 8,
        "max_steps": 3,
        "max_length": 128,
    }
    job = service.train("grpo", "tiny", service.upload_rows(rows), grader=grader, **settings)
    assert job["method"]["grpo"]["grader"]["reference"] == "{{item.answer}}"
    assert job["method"]["grpo"]["hyperparameters"]["reward_model"] is None
    metrics = service.metrics(job)
    assert 0 < metrics["train_reward"] < 1
    assert "valid_reward_before" in metrics

    lacking = service.upload_rows([*rows[:3], {"question": "And now?"}])
    body = {
        "model": "tiny",
        "training_file": lacking,
        "method": {"type": "grpo", "grpo": {"grader": grader, "hyperparameters": settings}},
    }
    made = service.http.post("/fine_tuning/jobs", json=body).json()
    ended = wait_for(
        lambda: (
            job
            if (job := service.http.get(f"/fine_tuning/jobs/{made['id']}?wait=30").json())["status"]
            in ("succeeded", "failed")
            else None
        ),
        within_s=300,
        what="the end of a job whose rows lack what the grader reads",
    )
    assert ended["status"] == "failed"
    assert "line 4: the grader reads item.answer" in ended["error"]["message"]
    neither = service.http.post(
        "/fine_tuning/jobs", json={"model": "tiny", "training_file": lacking, "method": {"type": "grpo"}}
    )
    assert neither.json()["error"]["code"] == "missing_required_parameter"
    body["method"]["grpo"]["grader"] = {"type": "regex", "pattern": "("}
    refused = service.http.post("/fine_tuning/jobs", json=body).json()["error"]
    assert refused["param"] == "method.grpo.grader.pattern"
