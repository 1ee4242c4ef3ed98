"""Models: ids with every character that ids have, and deletion."""

import time
import uuid

import openai
from openai import BadRequestError, NotFoundError, OpenAI

from .context import Context, conforming, refusal


def check_models(client: OpenAI, context: Context) -> None:
    tuned = client.fine_tuning.jobs.retrieve(context.finished_job).fine_tuned_model
    assert tuned is not None
    listed = {model.id: conforming(model) for model in client.models.list()}
    for model_id in (context.base, context.slashed, tuned):
        model = conforming(client.models.retrieve(model_id))
        assert isinstance(model, openai.types.Model)
        assert (model.id, model.object) == (model_id, "model")
        assert isinstance(model.owned_by, str)
        single = model.to_dict()  # with what is too long for a list
        assert (single["evaluation"] is not None) == (model_id == tuned)
        assert [step["model"] for step in single["lineage"]][-1] == model_id
        assert single | {"evaluation": None, "lineage": None} == listed[model_id].to_dict()
    assert listed[tuned].to_dict()["parent"] == context.base


def check_models_delete(client: OpenAI, context: Context) -> None:
    for base in (context.base, context.slashed):
        assert refusal(BadRequestError, client.models.delete, base).code == "model_not_deletable"
    _delete(client, _failed_import(client))
    job = client.fine_tuning.jobs.retrieve(context.finished_job)
    assert job.fine_tuned_model is not None
    if context.may_delete:
        _delete(client, job.fine_tuned_model)
        assert client.fine_tuning.jobs.retrieve(job.id) == job


def _failed_import(client: OpenAI) -> str:
    """The id of a model whose import was refused; admins may delete what is left of it."""
    model_id = f"org/{uuid.uuid4().hex}"
    client.post("/models/import", cast_to=object, body={"id": model_id, "source": "/nowhere"})
    deadline = time.monotonic() + 30
    while client.models.retrieve(model_id).to_dict()["status"] == "importing":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return model_id


def _delete(client: OpenAI, model_id: str) -> None:
    deleted = conforming(client.models.delete(model_id))
    assert (deleted.id, deleted.object, deleted.deleted) == (model_id, "model", True)
    for call in (client.models.retrieve, client.models.delete):
        error = refusal(NotFoundError, call, model_id)
        assert error.code == "model_not_found"
        assert f"`{model_id}`" in error.message
