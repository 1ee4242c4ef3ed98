"""The main job with the official SDK, unchanged: upload, create, poll, chat with the result at once."""

import json
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

from tests.stack import Stack, wait_for

HYPERPARAMETERS = {
    "n_epochs": 2,
    "batch_size": 4,
    "learning_rate": 0.01,
    "max_length": 128,
    "max_validation_overlap": 1,  # the same rows tell what was learnt
    "save_steps": 10,
    "eval_max_tokens": 8,
}


@pytest.fixture(scope="module")
def client(stack: Stack) -> OpenAI:
    return stack.sdk()


@pytest.fixture(scope="module")
def tuned(client: OpenAI, chat_file: Path) -> str:
    """A model that went the whole road, validation file included."""
    ids = []
    for _ in range(2):
        with chat_file.open("rb") as source:
            file = client.files.create(file=source, purpose="fine-tune")
        processed = client.files.wait_for_processing(file.id, poll_interval=0.2)
        assert processed.status == "processed", processed.status_details
        ids.append(file.id)
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=ids[0],
        validation_file=ids[1],
        suffix="main",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},
    )
    assert job.status in ("validating_files", "queued", "running")
    ended = wait_for(
        lambda: (
            found
            if (found := client.fine_tuning.jobs.retrieve(job.id)).status
            in ("succeeded", "failed", "cancelled")
            else None
        ),
        within_s=400,
        what="end of the job",
        every_s=0.5,
    )
    assert ended.status == "succeeded", ended.error
    assert ended.fine_tuned_model is not None
    assert ended.fine_tuned_model.startswith("ft:tiny:default:main:")
    return ended.fine_tuned_model


def test_the_result_answers_at_once_whole_and_streamed(client: OpenAI, tuned: str) -> None:
    messages = [{"role": "user", "content": "Patient 3 has a rash. What now?"}]
    whole = client.chat.completions.create(model=tuned, messages=messages, temperature=0, max_tokens=16)  # type: ignore[arg-type]
    assert whole.model == tuned
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 16
    parts = []
    with client.chat.completions.create(
        model=tuned,
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=16,
        stream=True,
    ) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                parts.append(chunk.choices[0].delta.content)
    assert "".join(parts) == whole.choices[0].message.content


def test_events_tell_the_story(client: OpenAI, tuned: str) -> None:
    job = next(job for job in client.fine_tuning.jobs.list() if job.fine_tuned_model == tuned)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))[::-1]  # several pages
    messages = [event.message for event in events if event.type == "message"]
    expected = [
        f"Created fine-tuning job: {job.id}",
        "Validating training file",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "New fine-tuned model created",
        "The job has successfully completed",
    ]
    positions = [next(i for i, m in enumerate(messages) if m.startswith(e)) for e in expected]
    assert positions == sorted(positions)
    metrics = [event for event in events if event.type == "metrics"]
    losses = [e.data["train_loss"] for e in metrics if e.data.get("train_loss") is not None]  # type: ignore[index, union-attr]
    held_out = [e.data["full_valid_loss"] for e in metrics if e.data.get("full_valid_loss") is not None]  # type: ignore[index, union-attr]
    assert losses[-1] < losses[0]
    assert held_out[-1] < held_out[0]


def test_the_tuned_model_differs_from_its_base(client: OpenAI, tuned: str) -> None:
    models = {model.id: model for model in client.models.list()}
    assert models[tuned].to_dict()["parent"] == "tiny"
    assert models[tuned].to_dict()["digest"] != models["tiny"].to_dict()["digest"]


def test_the_model_tells_how_it_was_evaluated(client: OpenAI, tuned: str) -> None:
    evaluation = client.models.retrieve(tuned).to_dict()["evaluation"]
    steps = {facts["step"]: facts for facts in evaluation["steps"]}  # type: ignore[index, call-overload]
    assert list(steps) == [0, 10, 20, 30, 32]
    assert steps[32]["valid_perplexity"] < steps[0]["valid_perplexity"]
    rows = [f"Patient {i} has" for i in range(3)]
    for facts in steps.values():
        assert [
            answer["prompt"][: len(row)] for answer, row in zip(facts["answers"], rows, strict=True)
        ] == rows
    job = next(job for job in client.fine_tuning.jobs.list() if job.fine_tuned_model == tuned)
    assert json.loads(client.files.content(job.result_files[1]).text) == evaluation
    saved = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert saved.metrics.to_dict()["valid_perplexity"] == steps[32]["valid_perplexity"]
    checkpoint = client.models.retrieve(saved.fine_tuned_model_checkpoint).to_dict()
    assert checkpoint["evaluation"] == evaluation
    events = [event for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.data]
    told = [event.data for event in events if event.data.get("code") == "evaluation"]  # type: ignore[attr-defined]
    assert told[-1] == {"code": "evaluation", "step": 0, "answers": steps[0]["answers"]}


def test_a_bad_line_is_named_and_fails_the_job(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text(json.dumps(good) + "\n{broken\n")
    with path.open("rb") as source:
        file = client.files.create(file=source, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    checked = client.files.wait_for_processing(file.id, poll_interval=0.2)
    assert checked.status == "error"
    assert "Line 2" in (checked.status_details or "")
    failed = wait_for(
        lambda: found if (found := client.fine_tuning.jobs.retrieve(job.id)).status == "failed" else None,
        within_s=20,
        what="the job to fail",
    )
    assert failed.error is not None
    assert failed.error.code == "invalid_training_file"
    assert "Line 2" in failed.error.message
    with pytest.raises(BadRequestError, match="Line 2"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)


def test_cancel_is_seen_within_seconds(client: OpenAI, long_job: str) -> None:
    wait_for(
        lambda: client.fine_tuning.jobs.retrieve(long_job).to_dict().get("progress"),
        within_s=200,
        what="the first step",
    )
    client.fine_tuning.jobs.cancel(long_job)
    wait_for(
        lambda: client.fine_tuning.jobs.retrieve(long_job).status == "cancelled",
        within_s=30,
        what="the end after a cancel",
    )


@pytest.fixture
def long_job(client: OpenAI, chat_file: Path) -> str:
    with chat_file.open("rb") as source:
        file = client.files.create(file=source, purpose="fine-tune")
    hyperparameters = HYPERPARAMETERS | {"n_epochs": 50, "max_steps": 100_000}
    return client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
    ).id
