"""Models: imported bases and merged results, with their lineage."""

import shutil
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db import deployments, stages, tasks
from db.errors import Conflict, NotFound
from db.models import Deployment, Job, Model
from db.scope import owns, scoped
from db.session import Database, clock
from db.states import JOB_TERMINAL
from db.tables import Org


def start_import(
    session: Session, *, org_id: str, model_id: str, source: str, base_id: str | None = None
) -> Model:
    """Record a model to be imported from `source` and queue the work.

    With `base_id` the source is an adapter; what comes of it belongs to the organisation, as the result of a
    job does. Raises `NotFound` for the base, and `Conflict` if it is not ready or the id is taken; a failed
    import may be started again under the same id.
    """
    base = None if base_id is None else get_ready(session, base_id, org_id=org_id)
    existing = session.scalar(scoped(Model, org_id).where(Model.id == model_id))
    if existing is not None and existing.status != "failed":
        raise _taken(model_id)
    if base is None and existing is None and _is_used_anywhere(session, model_id):
        raise _taken(model_id)  # a public model must not stand beside a tenant's own of the same name
    if existing is not None:
        existing.deleted_at = clock(session)
        session.flush()
    model = Model(
        id=model_id,
        org_id=org_id,
        public=base is None,
        kind="base" if base is None else "merged",
        status="importing",
        source=source,
        parent_id=None if base is None else base.id,
        root_id=model_id if base is None else base.root_id,
        created_at=clock(session),
    )
    try:
        with session.begin_nested():
            session.add(model)
    except IntegrityError as error:  # another request took the id a moment ago
        raise _taken(model_id) from error
    tasks.enqueue(session, kind="import", subject_id=str(model.pk), org_id=org_id)
    return model


def get(session: Session, model_id: str, *, org_id: str, hold: bool = False) -> Model:
    """A model by its id, whatever its status. Raises `NotFound`.

    With `hold` it cannot be deleted before this transaction ends.
    """
    select_ = scoped(Model, org_id).where(Model.id == model_id)
    model = session.scalar(select_.with_for_update(read=True) if hold else select_)
    if model is None:
        raise NotFound("model", model_id)
    return model


def get_ready(session: Session, model_id: str, *, org_id: str, hold: bool = False) -> Model:
    """A model that can be used now. Raises `NotFound`, or `Conflict` while it is imported."""
    model = get(session, model_id, org_id=org_id, hold=hold)
    if model.status != "ready":
        raise Conflict("model_not_ready", describe_unready(model), param="model")
    return model


def get_trainable(session: Session, model_id: str, *, org_id: str) -> Model:
    """A model that a training can start from, held until the commit. Raises `NotFound`, `Conflict`."""
    model = get_ready(session, model_id, org_id=org_id, hold=True)
    if model.kind == "checkpoint":
        message = f"'{model.id}' is a checkpoint; training starts from base and fine-tuned models."
        raise Conflict("model_not_trainable", message, param="model")
    if is_reward_model(model):
        message = f"'{model.id}' is a reward model: it judges answers and cannot be the start of a training."
        raise Conflict("model_not_trainable", message, param="model")
    return model


def hold_judge(session: Session, spec: dict[str, Any], *, org_id: str) -> Model | None:
    """The reward model that a job's spec names, held until the commit; None if its method needs none.

    Raises `Conflict`, whose param is the path of the hyperparameter.
    """
    method = spec["method"]
    given = method.get(method["type"], {}).get("hyperparameters", {})
    if "reward_model" not in given:
        return None
    param = f"method.{method['type']}.hyperparameters.reward_model"
    if given["reward_model"] is None:
        if method[method["type"]].get("grader"):
            return None
        raise Conflict("missing_required_parameter", _name_missing(method["type"], param), param=param)
    try:
        judge = get_ready(session, given["reward_model"], org_id=org_id, hold=True)
    except NotFound as error:
        raise Conflict("model_not_found", str(error), param=param) from error
    if not is_reward_model(judge):
        raise Conflict("not_a_reward_model", f"'{judge.id}' is not a reward model.", param=param)
    if judge.kind == "checkpoint":  # its base alone, which has no trained head
        message = f"'{judge.id}' is a checkpoint; name the reward model that its job made."
        raise Conflict("not_a_reward_model", message, param=param)
    return judge


def _name_missing(method: str, param: str) -> str:
    also = ", or a grader in 'method.grpo.grader'" if method == "grpo" else ""
    return f"Missing required parameter: '{param}'{also}."


def describe_unready(model: Model) -> str:
    """Why a model cannot be used now, in words for its user."""
    if model.error is None:
        return f"The model '{model.id}' is still being imported."
    return f"The import of '{model.id}' failed: {model.error['message']} ({model.error['code']})"


def is_reward_model(model: Model) -> bool:
    """Whether the model gives a number to a text, and none of its own."""
    return (model.details or {}).get("head") == "score"


def list_all(session: Session, *, org_id: str) -> list[Model]:
    """All models the tenant may use or is importing, oldest first."""
    return list(session.scalars(scoped(Model, org_id).order_by(Model.created_at, Model.pk)))


def trace(session: Session, model: Model) -> list[tuple[Model, Job | None]]:
    """The way from a model's base to itself, each with the job that made it; what was deleted since, too."""
    way: list[tuple[Model, Job | None]] = []
    following: Model | None = model
    while following is not None:
        job = None if following.job_id is None else session.get(Job, following.job_id)
        way.append((following, job))
        following = _parent_of(session, following, job)
    return way[::-1]


def _parent_of(session: Session, model: Model, job: Job | None) -> Model | None:
    if job is not None:
        return session.get_one(Model, job.model_pk)
    # An imported adapter names the id of its base, which another model may have by now.
    earlier = (
        Model.id == model.parent_id,
        Model.pk < model.pk,
        or_(Model.org_id == model.org_id, Model.public),
    )
    return session.scalar(select(Model).where(*earlier).order_by(Model.pk.desc()).limit(1))


def record_import(session: Session, model_pk: int, *, path: Path, report: dict[str, Any]) -> None:
    """The import is done: `report` holds the digest and what is known of the model."""
    model = session.get_one(Model, model_pk)
    model.status, model.path, model.digest = "ready", str(path), report["digest"]
    model.details = {key: value for key, value in report.items() if key != "digest"}
    session.flush()


def fail_import(session: Session, model_pk: int, *, code: str, message: str) -> None:
    """The import was refused or broke."""
    model = session.get_one(Model, model_pk)
    model.status, model.error = "failed", {"code": code, "message": message}
    session.flush()


def name_result(session: Session, job: Job, *, root_id: str | None = None) -> str:
    """The id of the model that `job` makes: `ft:<base>:<org>:<suffix>:<8 characters>`.

    `root_id` is the base at the start of its lineage, for a job whose model does not exist yet.
    """
    root_id = root_id or session.get_one(Model, job.model_pk).root_id
    org = session.get_one(Org, job.org_id)
    return f"ft:{root_id.replace('/', '--')}:{org.name}:{job.suffix or ''}:{job.id[-8:]}"


def register_merged(
    session: Session, job: Job, *, path: Path, adapter_path: Path, report: dict[str, Any]
) -> Model:
    """Register the merged result of `job`; both the merged folder and the adapter belong to the row."""
    parent = session.get_one(Model, job.model_pk)
    merged = Model(
        id=name_result(session, job),
        org_id=job.org_id,
        public=False,
        kind="merged",
        status="ready",
        source=f"job:{job.id}",
        path=str(path),
        digest=report["digest"],
        adapter_path=None if "trained" in report else str(adapter_path),  # all weights, and no adapter
        details={key: value for key, value in report.items() if key != "digest"},
        parent_id=parent.id,
        root_id=parent.root_id,
        job_id=job.id,
        created_at=clock(session),
    )
    session.add(merged)
    session.flush()
    return merged


def register_checkpoint(session: Session, job: Job, *, name: str, path: Path, digest: str) -> None:
    """Make a checkpoint a model: its base with the adapter in `path`. A step reached again replaces it."""
    parent = session.get_one(Model, job.model_pk)
    model = _live_checkpoint(session, job, name)
    if model is None:
        model = Model(
            id=name,
            org_id=job.org_id,
            public=False,
            kind="checkpoint",
            status="ready",
            source=f"job:{job.id}",
            path=parent.path,
            details=(parent.details or {}) | {"head": "score" if job.method == "reward" else "lm"},
            parent_id=parent.id,
            root_id=parent.root_id,
            job_id=job.id,
            created_at=clock(session),
        )
        session.add(model)
    model.adapter_path, model.digest = str(path), digest
    session.flush()


def forget_checkpoint(session: Session, job: Job, *, name: str) -> None:
    """The files of a checkpoint are gone: nothing may be served from it any more."""
    model = _live_checkpoint(session, job, name)
    if model is not None:
        _retire(session, model)


def _live_checkpoint(session: Session, job: Job, name: str) -> Model | None:
    return session.scalar(scoped(Model, job.org_id).where(Model.id == name, Model.job_id == job.id))


def _retire(session: Session, model: Model) -> None:
    for deployment in session.scalars(select(Deployment).where(Deployment.model_pk == model.pk)):
        deployments.end(session, deployment)
    model.deleted_at = clock(session)
    session.flush()


def delete(database: Database, model_id: str, *, org_id: str) -> None:
    """Delete a fine-tuned model and its folder; the job record stays. Raises `NotFound`, `Conflict`."""
    with database.write() as session:
        model = session.scalar(scoped(Model, org_id).where(Model.id == model_id).with_for_update())
        if model is None:
            raise NotFound("model", model_id)
        if model.kind == "checkpoint":
            raise Conflict("model_not_deletable", f"The checkpoint '{model_id}' belongs to its job.")
        # A public base belongs to all; only its owner may clear away one whose import failed.
        if not owns(model, org_id) or (model.kind == "base" and model.status != "failed"):
            raise Conflict("model_not_deletable", f"The base model '{model_id}' cannot be deleted here.")
        # Checkpoints of jobs that started from this model are served from its folder.
        gone = [model, *session.scalars(select(Model).where(*_served_from(model)).with_for_update())]
        user = session.scalar(
            select(Job.id).where(Job.model_pk == model.pk, Job.status.not_in(JOB_TERMINAL)).limit(1)
        )
        served = session.scalar(
            select(Deployment.id)
            .where(
                Deployment.model_pk.in_([each.pk for each in gone]),
                or_(Deployment.desired == "running", Deployment.status != "stopped"),
                Deployment.auto.is_(False),
            )
            .limit(1)
        )
        readers = (stages.find_reader(session, each) for each in gone)
        user = user or served or next(filter(None, readers), None)
        if user:
            raise Conflict("model_in_use", f"The model '{model_id}' is used by {user}.")
        for each in gone:
            _retire(session, each)
        path = model.path
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)


def _served_from(model: Model) -> tuple[ColumnElement[bool], ...]:
    return Model.kind == "checkpoint", Model.path == model.path, Model.deleted_at.is_(None)


def _is_used_anywhere(session: Session, model_id: str) -> bool:
    query = select(Model.pk).where(Model.id == model_id, Model.deleted_at.is_(None)).limit(1)
    return session.scalar(query) is not None


def _taken(model_id: str) -> Conflict:
    return Conflict("model_exists", f"There is a model with the id '{model_id}' already.", param="id")
