"""Adapters that jobs have made: what they are called, what they belong to, and who may start from them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session

from db import registry, sources, stages
from db.errors import Conflict, NotFound
from db.models import Checkpoint, Job, Model
from db.new_jobs import NewJob
from db.scope import scoped
from db.states import JOB_TERMINAL

PARAMETER = "init_adapter"
# Two adapters must share them for the weights of one to be those of the other.
_SHAPE = ("lora_rank", "lora_alpha", "target_modules", "modules_to_save")


def find(session: Session, name: str, *, org_id: str, hold: bool = True) -> tuple[Model, Job]:
    """The model of an adapter, with `hold` kept until the commit, and the job that trained it.

    `name` is the id of a job, for what came of it in the end, or of its model, or of a checkpoint. Raises
    `NotFound`, and `Conflict` for what is not a trained adapter that stays.
    """
    job = session.scalar(scoped(Job, org_id).where(Job.id == name))
    if job is not None and job.fine_tuned_model is None:
        raise Conflict("no_adapter", f"The job '{name}' is {job.status} and has made no adapter.")
    checkpoint = session.scalar(scoped(Checkpoint, org_id).where(Checkpoint.id == name))
    model_id = job.fine_tuned_model if job else checkpoint.name if checkpoint else name
    model = registry.get_ready(session, str(model_id), org_id=org_id, hold=hold)
    made_by = session.get(Job, model.job_id) if model.job_id else None
    if made_by is None or model.adapter_path is None or (made_by.resolved or {}).get("use_peft") is False:
        raise Conflict("no_adapter", f"'{model.id}' has no adapter of its own.")
    if made_by.status not in JOB_TERMINAL:  # it drops its older checkpoints as it goes on
        message = f"The job '{made_by.id}' is {made_by.status} and may yet drop the checkpoint '{model.id}'."
        raise Conflict("adapter_not_settled", message)
    return model, made_by


def describe_misfit(session: Session, made_by: Job, *, base_digest: str | None, base_name: str) -> str | None:
    """Why an adapter of the job does not belong to a base; None if it does."""
    own = session.get_one(Model, made_by.model_pk)
    if own.digest == base_digest:
        return None
    return (
        f"The adapter of '{made_by.id}' was trained on '{own.id}' (sha256 {own.digest}), "
        f"and not on '{base_name}' (sha256 {base_digest})."
    )


def settle(session: Session, new: NewJob, *, base: Model | None, org_id: str) -> NewJob:
    """The job with the adapter that it starts from held, under its model's name and with its shape.

    `base` is the job's model, None while that is still to be made. A job that starts from none is returned as
    it is. Raises `Conflict`, whose param is the path of the hyperparameter.
    """
    given = new.spec["method"].get(new.method, {}).get("hyperparameters", {})
    if given.get(PARAMETER) is None:
        return new
    path = f"method.{new.method}.hyperparameters"
    with _blamed_on(f"{path}.{PARAMETER}"):
        model, made_by = find(session, given[PARAMETER], org_id=org_id)
    if base is None:
        misfit = f"The adapter of '{made_by.id}' cannot belong to a model that is still to be made."
    else:
        misfit = describe_misfit(session, made_by, base_digest=base.digest, base_name=base.id)
    if misfit is not None:
        raise Conflict("wrong_base", misfit, param=f"{path}.{PARAMETER}")
    shape: dict[str, Any] = made_by.resolved or {}
    if shape.get("new_tokens"):
        message = f"The adapter of '{made_by.id}' brings tokens of its own: train from its merged model."
        raise Conflict("adapter_misfit", message, param=f"{path}.{PARAMETER}")
    if (new.method == "reward") != registry.is_reward_model(model):
        what = "is" if registry.is_reward_model(model) else "is not"
        message = f"'{model.id}' {what} a reward model, and {new.method} trains another kind of head."
        raise Conflict("adapter_misfit", message, param=f"{path}.{PARAMETER}")
    spec = stages.set_parameter(new.spec, PARAMETER, model.id)
    for name in _SHAPE:
        if given.get(name, shape.get(name)) != shape.get(name):
            message = f"{name} is {given[name]!r}, and the adapter of '{made_by.id}' has {shape.get(name)!r}."
            raise Conflict("adapter_misfit", message, param=f"{path}.{name}")
        spec = stages.set_parameter(spec, name, shape.get(name))
    return replace(new, spec=spec)


def check_chain(session: Session, names: Sequence[str], *, base_id: str, org_id: str) -> None:
    """Refuse adapters of jobs that belong neither to the base nor to the result of the adapter before them.

    Of other adapters only a look at their tensors tells whether they fit. Raises `NotFound` for the base, and
    `Conflict`, whose param is the adapter's place in `adapters`.
    """
    base = registry.get_ready(session, base_id, org_id=org_id, hold=True)
    digest, known_as = base.digest, base.id
    for position, name in enumerate(names):
        if not sources.is_job(name):
            digest = None  # nobody knows yet what comes of it
            continue
        param = f"adapters.{position}"
        with _blamed_on(param):
            model, made_by = find(session, name, org_id=org_id)
        if registry.is_reward_model(model):
            message = (
                f"The adapter of '{name}' is a reward model's; only those of language models are merged."
            )
            raise Conflict("no_adapter", message, param=param)
        misfit = digest and describe_misfit(session, made_by, base_digest=digest, base_name=known_as)
        if misfit:
            raise Conflict("wrong_base", misfit, param=param)
        digest, known_as = model.digest, model.id


@contextmanager
def _blamed_on(param: str) -> Iterator[None]:
    """Refuse what is wrong with an adapter as a mistake at the place where it is named."""
    try:
        yield
    except NotFound as error:
        raise Conflict("adapter_not_found", str(error), param=param) from error
    except Conflict as error:
        raise Conflict(error.code, str(error), param=param) from error
