"""All weights, and modules trained whole, through REST: trained, published, served, checkpoints too."""

import pytest

from tests.contracts.test_methods import Service
from tests.contracts.test_pipeline import QUESTION, find_folder, read_weights
from tests.stack import Stack
from tests.tiny import chat_rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_a_full_run_on_two_ranks_is_served_with_its_checkpoints(stack: Stack) -> None:
    with stack.http() as http:
        service = Service(http)
        rows = service.upload_rows(chat_rows(48))
        job = service.train(
            "supervised", "tiny", rows, use_peft=False, max_length=128, save_steps=6, nproc_per_node=2
        )
        metrics = service.metrics(job)
        assert metrics["valid_loss"] < metrics["valid_loss_before"]

        path = f"/fine_tuning/jobs/{job['id']}"
        kinds = {found["kind"] for found in http.get(f"{path}/artifacts").json()["data"]}
        assert "model" in kinds
        assert "adapter" not in kinds
        model = job["fine_tuned_model"]
        models = {found["id"]: found for found in http.get("/models").json()["data"]}
        assert (models[model]["parent"], models[model]["root"]) == ("tiny", "tiny")
        merged, before = (read_weights(find_folder(stack, name)) for name in (model, "tiny"))
        assert {k: v.dtype for k, v in merged.items()} == {k: v.dtype for k, v in before.items()}

        saved = http.get(f"{path}/checkpoints").json()["data"]
        last = max(saved, key=lambda found: found["step_number"])["fine_tuned_model_checkpoint"]
        answers = {}
        for name in ("tiny", last, model):
            answer = http.post("/chat/completions", json=QUESTION | {"model": name, "temperature": 0})
            assert answer.status_code == 200, answer.text
            answers[name] = answer.json()["choices"][0]["message"]["content"]
        assert answers[last] == answers[model] != answers["tiny"]

        # The next stage starts from it, with some modules trained whole.
        later = service.train("supervised", model, rows, modules_to_save="embed_tokens", max_length=128)
        models = {found["id"]: found for found in http.get("/models").json()["data"]}
        assert models[later["fine_tuned_model"]]["parent"] == model
        after = read_weights(find_folder(stack, later["fine_tuned_model"]))
        assert after.keys() == merged.keys()  # tied stays tied
        assert not after["model.embed_tokens.weight"].equal(merged["model.embed_tokens.weight"])
