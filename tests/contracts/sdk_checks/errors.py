"""What the client raises, and what it tells of raw answers."""

from typing import Any

import openai
from openai import BadRequestError, NotFoundError, OpenAI

from .chat import ask
from .context import Context, refusal


def check_version(_client: OpenAI, context: Context) -> None:
    assert openai.__version__ == context.version


def check_wrong_key(client: OpenAI, _context: Context) -> None:
    for key in ("sk-wrong", client.api_key[:-1] + ("0" if client.api_key[-1] != "0" else "1")):
        error = refusal(openai.AuthenticationError, client.with_options(api_key=key).models.list)
        assert error.code == "invalid_api_key"


def check_unknown_ids(client: OpenAI, context: Context) -> None:
    unknown = "ftjob-doesnotexist"
    jobs = client.fine_tuning.jobs
    for call in (
        jobs.retrieve,
        jobs.cancel,
        jobs.pause,
        jobs.resume,
        jobs.list_events,
        jobs.checkpoints.list,
    ):
        error = refusal(NotFoundError, call, unknown)
        assert (error.code, error.param) == ("not_found", "id")
        assert unknown in error.message
    for model in ("unknown", "org/unknown", "ft:tiny:default::00000000"):
        assert refusal(NotFoundError, client.models.retrieve, model).code == "model_not_found"
    error = refusal(NotFoundError, ask, client, context, model="unknown")
    assert (error.code, error.param) == ("model_not_found", "model")
    assert "The model `unknown` does not exist or you do not have access to it." in error.message


def check_bad_jobs_are_refused(client: OpenAI, context: Context) -> None:
    def error_of(kind: type[openai.APIStatusError] = BadRequestError, **wishes: Any) -> Any:
        wishes = {"model": context.base, "training_file": context.training_file} | wishes
        return refusal(kind, client.fine_tuning.jobs.create, **wishes)

    def supervised(**hyperparameters: Any) -> dict[str, Any]:
        return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}

    error = error_of(method=supervised(n_epochs=0))
    assert (error.code, error.param) == ("invalid_value", "method.supervised.hyperparameters.n_epochs")
    error = error_of(hyperparameters={"batch_size": 257})
    assert (error.code, error.param) == ("invalid_value", "hyperparameters.batch_size")
    error = error_of(method=supervised(n_epoch=3))
    assert (error.code, error.param) == (
        "unknown_parameter",
        "method.supervised.hyperparameters.n_epoch",
    )
    assert "n_epochs" in error.message
    error = error_of(extra_body={"sufix": "v1"})
    assert (error.code, error.param) == ("unknown_parameter", "sufix")
    assert "'suffix'" in error.message
    assert error_of(seed=-1).param == "seed"
    assert error_of(metadata={"k": "v" * 513}).param == "metadata.k"
    error = error_of(NotFoundError, model="unknown")
    assert (error.code, error.param) == ("model_not_found", "model")
    error = error_of(NotFoundError, training_file="file-unknown")
    assert (error.code, error.param) == ("not_found", "training_file")
    note = client.files.create(file=("note.txt", b"note"), purpose="user_data")
    assert error_of(validation_file=note.id).param == "validation_file"
    client.files.delete(note.id)


def check_raw_answers(client: OpenAI, context: Context) -> None:
    raw = client.fine_tuning.jobs.with_raw_response.retrieve(context.finished_job)
    assert raw.status_code == 200
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.headers["x-request-id"].startswith("req_")
    assert int(raw.headers["openai-processing-ms"]) >= 0
    job = raw.parse()
    assert (job.id, job._request_id) == (context.finished_job, raw.headers["x-request-id"])
