"""The official client, unchanged, against a real server."""

import json
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from db import tasks

ROWS = b"".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "Yes"}]}
    ).encode()
    + b"\n"
    for n in range(10)
)


@pytest.fixture
def sdk(server, world) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server}/v1", api_key=world.user) as client:
        yield client


def test_files(sdk, world):
    file = sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    assert (file.bytes, file.filename, file.status) == (len(ROWS), "rows.jsonl", "uploaded")
    world.check_file(file.id)
    assert sdk.files.wait_for_processing(file.id).status == "processed"
    assert sdk.files.content(file.id).read() == ROWS
    assert [listed.id for listed in sdk.files.list(limit=1)] == [file.id]
    assert sdk.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        sdk.files.retrieve(file.id)


def test_a_job_from_upload_to_model(sdk, world):
    base = world.base_model()
    file = sdk.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        suffix="v1",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        metadata={"team": "x"},
        extra_body={"resources": {"nproc_per_node": 1}},
        extra_headers={"Idempotency-Key": "mine"},
    )
    assert (job.status, job.hyperparameters.n_epochs) == ("validating_files", 1)
    assert job.model_extra is not None
    assert job.model_extra["resources"]["nproc_per_node"] == 1
    world.check_file(file.id)
    model = world.finish(world.start(job.id))
    job = sdk.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("succeeded", model, 512)
    events = list(sdk.fine_tuning.jobs.list_events(job.id, limit=2))
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert list(sdk.fine_tuning.jobs.checkpoints.list(job.id)) == []
    assert sdk.models.retrieve(model).id == model
    assert sdk.models.retrieve(base).id == base
    assert [listed.id for listed in sdk.models.list()] == [base, model]
    assert sdk.models.delete(model).deleted


def test_iteration_crosses_pages(sdk, world):
    base, file = world.base_model(), world.file()
    made = [sdk.fine_tuning.jobs.create(model=base, training_file=file).id for _ in range(5)]
    assert [job.id for job in sdk.fine_tuning.jobs.list(limit=2)] == made[::-1]


def test_cancel(sdk, world):
    job = sdk.fine_tuning.jobs.create(model=world.base_model(), training_file=world.file())
    assert sdk.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.fine_tuning.jobs.cancel(job.id)
    assert refused.value.code == "job_not_cancellable"


def test_errors_have_all_their_parts(sdk):
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.fine_tuning.jobs.create(model="m", training_file="f", seed=-1)
    error = refused.value
    assert (error.code, error.param, error.type) == ("invalid_value", "seed", "invalid_request_error")
    assert error.request_id is not None
    assert error.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.models.retrieve("org/unknown")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as denied:
        sdk.with_options(api_key="sk-wrong").models.list()
    assert denied.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        sdk.post("/models/import", cast_to=object, body={"id": "m", "source": "/s"})


def test_upload_over_the_limit(sdk, settings):
    with pytest.raises(openai.APIStatusError) as refused:
        sdk.files.create(file=("rows.jsonl", b"x" * (settings.max_upload_bytes * 40)), purpose="fine-tune")
    assert refused.value.status_code == 413
    assert refused.value.code == "request_too_large"


def test_a_deployment_through_the_client(sdk, world):
    made = sdk.post("/deployments", cast_to=object, body={"model": world.base_model()})
    assert made["status"] == "pending"
    with world.database.read() as session:
        assert not tasks.waiting(session, "cpu")


def test_the_official_client_says_in_extra_body_how_a_file_is_read(sdk):
    said = {"format": "question", "column_map": {"question": "Frage", "system": "Rolle"}}
    made = sdk.files.create(file=("rows.csv", b"Frage\n"), purpose="fine-tune", extra_body=said)
    assert {name: getattr(made, name) for name in said} == said
