"""What the checks are given, and how they judge answers and refusals."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
from openai import OpenAI

TERMINAL = ("succeeded", "failed", "cancelled")
ROWS = b"".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"Case {n}?"}, {"role": "assistant", "content": "Rest."}]}
    ).encode()
    + b"\n"
    for n in range(12)
)


@dataclass(frozen=True)
class Context:
    """What the server holds when the checks begin."""

    version: str  # of the client
    base: str  # id of a base model
    slashed: str  # id of another one, with a slash in it
    training_file: str
    validation_file: str
    finished_job: str  # succeeded
    running_job: str  # holds the only device to the end, so that jobs made here wait
    may_delete: bool  # whether nobody needs the model of the finished job after these checks


def conforming(answer: Any) -> Any:
    """`answer`, judged by its own type: the client builds its objects without looking."""
    type(answer).model_validate_json(answer.to_json(), strict=True)
    return answer


def refusal(kind: type[openai.APIStatusError], call: Callable[..., Any], *args: Any, **wishes: Any) -> Any:
    """The error of a call that must be refused, complete and of this very class."""
    try:
        answer = call(*args, **wishes)
    except kind as error:
        refused = error
    else:
        raise AssertionError(f"not refused: {answer!r}")
    assert type(refused) is kind
    assert isinstance(refused.body, dict)
    assert set(refused.body) == {"message", "type", "param", "code"}
    assert isinstance(refused.body["message"], str)
    assert refused.type == "invalid_request_error"
    assert refused.code
    assert refused.request_id is not None
    assert refused.request_id.startswith("req_")
    return refused


@contextmanager
def waiting_job(client: OpenAI, context: Context, **wishes: Any) -> Iterator[Any]:
    """A job that waits for the device. Cancelled in the end."""
    wishes = {"model": context.base, "training_file": context.training_file} | wishes
    job = client.fine_tuning.jobs.create(**wishes)
    try:
        yield job
    finally:
        if client.fine_tuning.jobs.retrieve(job.id).status not in TERMINAL:
            client.fine_tuning.jobs.cancel(job.id)
