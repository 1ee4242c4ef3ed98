"""Fine-tuning jobs: create, list, events, checkpoints, cancel, pause, results."""

import base64
import csv
import json
import re
import time
import uuid
from itertools import pairwise
from typing import Any

import openai
from openai import BadRequestError, OpenAI

from .chat import ask
from .context import Context, conforming, refusal, waiting_job


def check_jobs_echo_every_field(client: OpenAI, context: Context) -> None:
    wandb = {"project": "wards", "name": "run 1", "entity": "clinic", "tags": ["a", "b"]}
    wishes: dict[str, Any] = {
        "validation_file": context.validation_file,
        "suffix": "every-field",
        "seed": 42,
        "method": {
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}
            },
        },
        "integrations": [{"type": "wandb", "wandb": wandb}],
        "metadata": {"team": "ward 7", "empty": ""},
    }
    with waiting_job(client, context, **wishes) as job:
        assert isinstance(conforming(job), openai.types.fine_tuning.FineTuningJob)
        assert job.id.startswith("ftjob-")
        assert (job.object, job.status) == ("fine_tuning.job", "queued")
        assert (job.model, job.training_file) == (context.base, context.training_file)
        assert (job.validation_file, job.seed) == (context.validation_file, 42)
        assert (job.method.type, job.method.dpo, job.method.reinforcement) == ("supervised", None, None)
        for echoed in (job.method.supervised.hyperparameters, job.hyperparameters):
            assert (echoed.n_epochs, echoed.batch_size, echoed.learning_rate_multiplier) == (3, "auto", 0.5)
        assert [item.to_dict() for item in job.integrations] == wishes["integrations"]
        assert job.metadata == wishes["metadata"]
        assert job.to_dict()["user_provided_suffix"] == "every-field"
        assert isinstance(job.organization_id, str)
        assert abs(job.created_at - time.time()) < 60
        assert (job.error, job.result_files) == (None, [])
        stored = client.fine_tuning.jobs.retrieve(job.id)
        assert stored.to_dict() == job.to_dict()


def check_jobs_choose_what_is_not_given(client: OpenAI, context: Context) -> None:
    with waiting_job(client, context) as job:
        assert 0 <= conforming(job).seed < 2**31
        chosen = job.method.supervised.hyperparameters
        assert (chosen.n_epochs, chosen.batch_size, chosen.learning_rate_multiplier) == ("auto",) * 3
        assert (job.validation_file, job.metadata, job.integrations) == (None, None, [])
    with waiting_job(client, context, method={"type": "supervised"}) as job:
        assert job.method.supervised.hyperparameters.n_epochs == "auto"


def check_jobs_take_the_deprecated_hyperparameters(client: OpenAI, context: Context) -> None:
    with waiting_job(client, context, hyperparameters={"n_epochs": 2, "batch_size": 4}) as job:
        assert (conforming(job).hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
        assert job.hyperparameters.learning_rate_multiplier == "auto"
        assert job.method.type == "supervised"
        assert job.method.supervised.hyperparameters.n_epochs == 2


def check_jobs_list(client: OpenAI, context: Context) -> None:
    made = []
    for _ in range(5):
        with waiting_job(client, context) as job:
            made.append(job.id)
    listed = list(client.fine_tuning.jobs.list(limit=2))
    ids = [job.id for job in listed]
    for job in listed:  # others' jobs may have methods that the client has no type for
        if job.id in (*made, context.finished_job, context.running_job):
            conforming(job)
    assert ids[:5] == made[::-1]
    assert len(set(ids)) == len(ids)
    assert {context.finished_job, context.running_job} <= set(ids)
    assert all(newer.created_at >= older.created_at for newer, older in pairwise(listed))
    page = client.fine_tuning.jobs.list(limit=2, after=made[3])
    assert ([job.id for job in page.data], page.has_more) == (made[2:0:-1], True)
    refusal(BadRequestError, client.fine_tuning.jobs.list, after="ftjob-unknown")


def check_jobs_list_by_metadata(client: OpenAI, context: Context) -> None:
    label = uuid.uuid4().hex
    jobs = client.fine_tuning.jobs
    made = []
    for n in range(3):
        with waiting_job(client, context, metadata={"label": label, "n": str(n)}) as job:
            made.append(job.id)
    with waiting_job(client, context) as job:
        bare = job.id
    assert [job.id for job in jobs.list(metadata={"label": label}, limit=2)] == made[::-1]
    assert [job.id for job in jobs.list(metadata={"label": label, "n": "1"})] == [made[1]]
    assert [job.id for job in jobs.list(extra_query={"metadata[label]": label}, limit=1)] == made[::-1]
    assert list(jobs.list(metadata={"label": "nobody's"})) == []
    without = [job.id for job in jobs.list(extra_query={"metadata": "null"})]
    assert bare in without
    assert not set(made) & set(without)


def check_events(client: OpenAI, context: Context) -> None:
    listed = client.fine_tuning.jobs.list_events(context.finished_job, limit=7)
    events = [conforming(event) for event in listed]
    assert len({event.id for event in events}) == len(events) > 14
    assert all(event.id.startswith("ftevent-") for event in events)
    assert {event.object for event in events} == {"fine_tuning.job.event"}
    assert all(newer.created_at >= older.created_at for newer, older in pairwise(events))
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {context.finished_job}"
    assert {event.type for event in events} == {"message", "metrics"}
    metrics = [event.data for event in events if event.type == "metrics"]
    steps = [data["step"] for data in metrics]
    assert steps == sorted(steps, reverse=True)
    assert all(0 <= data["step"] <= data["total_steps"] for data in metrics)  # 0: before training
    losses = [data["train_loss"] for data in metrics if data.get("train_loss") is not None]
    assert losses
    assert all(isinstance(loss, float) for loss in losses)


def check_checkpoints(client: OpenAI, context: Context) -> None:
    job = client.fine_tuning.jobs.retrieve(context.finished_job)
    pages = client.fine_tuning.jobs.checkpoints.list(job.id, limit=2)
    assert (len(pages.data), pages.has_more) == (2, True)
    checkpoints = [conforming(checkpoint) for checkpoint in pages]
    steps = [checkpoint.step_number for checkpoint in checkpoints]
    assert len(steps) == 3
    assert steps == sorted(steps, reverse=True)
    for checkpoint in checkpoints:
        step = checkpoint.step_number
        assert checkpoint.id.startswith("ftckpt_")
        assert checkpoint.fine_tuning_job_id == job.id
        assert checkpoint.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-{step}"
        assert job.created_at <= checkpoint.created_at <= job.finished_at
        assert checkpoint.metrics.step == step
        assert isinstance(checkpoint.metrics.train_loss, float)


def check_checkpoints_answer(client: OpenAI, context: Context) -> None:
    name = client.fine_tuning.jobs.checkpoints.list(context.finished_job).data[0].fine_tuned_model_checkpoint
    answer = conforming(ask(client, context, model=name, temperature=0))
    assert answer.model == name
    base = ask(client, context, temperature=0)
    assert answer.system_fingerprint != base.system_fingerprint
    assert answer.choices[0].message.content != base.choices[0].message.content


def check_cancel(client: OpenAI, context: Context) -> None:
    sent: list[str] = []
    counting = openai.DefaultHttpxClient(
        event_hooks={"request": [lambda request: sent.append(request.url.path)]}
    )
    with waiting_job(client, context) as job, client.with_options(http_client=counting) as counted:
        cancelled = conforming(counted.fine_tuning.jobs.cancel(job.id))
        assert (cancelled.id, cancelled.status, cancelled.error) == (job.id, "cancelled", None)
        assert cancelled.finished_at >= cancelled.created_at
        error = refusal(BadRequestError, counted.fine_tuning.jobs.cancel, job.id)
        assert error.code == "job_not_cancellable"
        assert sent == [f"/v1/fine_tuning/jobs/{job.id}/cancel"] * 2
        assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def check_pause_and_resume(client: OpenAI, context: Context) -> None:
    with waiting_job(client, context) as job:
        assert job.status == "queued"
        paused = client.fine_tuning.jobs.pause(job.id)
        assert (paused.id, paused.status, paused.finished_at) == (job.id, "paused", None)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
        resumed = conforming(client.fine_tuning.jobs.resume(job.id))
        assert (resumed.id, resumed.status) == (job.id, "queued")
        client.fine_tuning.jobs.cancel(job.id)
        refusal(BadRequestError, client.fine_tuning.jobs.pause, job.id)
        refusal(BadRequestError, client.fine_tuning.jobs.resume, job.id)


def check_result_files(client: OpenAI, context: Context) -> None:
    job = client.fine_tuning.jobs.retrieve(context.finished_job)
    [file_id, evaluation_id] = job.result_files
    file = conforming(client.files.retrieve(file_id))
    assert (file.purpose, file.filename[-4:]) == ("fine-tune-results", ".csv")
    assert file_id in [listed.id for listed in client.files.list(purpose="fine-tune-results")]
    content = client.files.content(file_id)
    assert len(content.content) == file.bytes
    header, *rows = csv.reader(content.text.splitlines())
    assert ",".join(header) == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    steps = [int(row[0]) for row in rows]
    assert steps == sorted(set(steps))
    assert [float(row[1]) for row in rows if row[1]]
    encoded = client.files.content(file_id, extra_query={"encoding": "base64"})
    assert base64.b64decode(encoded.read()) == content.content
    evaluation = json.loads(client.files.content(evaluation_id).text)
    assert [facts["step"] for facts in evaluation["steps"]][:: len(evaluation["steps"]) - 1] == [0, steps[-1]]


def check_when_times_and_tokens_are_known(client: OpenAI, context: Context) -> None:
    finished = conforming(client.fine_tuning.jobs.retrieve(context.finished_job))
    assert (finished.status, finished.error, finished.estimated_finish) == ("succeeded", None, None)
    assert finished.created_at <= finished.finished_at <= time.time()
    assert isinstance(finished.trained_tokens, int)
    assert finished.trained_tokens > 0
    assert re.fullmatch(rf"ft:{context.base}:[^:]+:[^:]*:[A-Za-z0-9]{{8}}", finished.fine_tuned_model)
    running = conforming(client.fine_tuning.jobs.retrieve(context.running_job))
    assert running.status == "running"
    assert running.estimated_finish > running.created_at
    used = running.method.supervised.hyperparameters
    assert (type(used.n_epochs), type(used.batch_size)) == (int, int)
    assert type(used.learning_rate_multiplier) is float
    with waiting_job(client, context) as waiting:
        assert waiting.estimated_finish is None
    for job in (running, waiting):
        assert (job.finished_at, job.trained_tokens, job.fine_tuned_model) == (None, None, None)
