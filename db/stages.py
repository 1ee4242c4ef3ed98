"""How the stages of a pipeline hang together: who needs what of whom, and what a stage was made from.

Within a pipeline the ids of the jobs rise from upstream to downstream, and jobs are locked in the order of
their ids; so whoever holds a job may lock those that build on it, and never waits for one that waits for him.
"""

import hashlib
import json
from collections.abc import Set
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import job_files
from db.files import describe_reading
from db.models import File, Job, Model, PipelineStage
from db.new_jobs import NewJob
from db.scope import scoped
from db.states import JOB_TERMINAL

# Hyperparameters that name a model, which another stage may make.
MODEL_PARAMETERS = ("reward_model",)
# Those and the ones that name a model which must be there.
_NAMING_PARAMETERS = (*MODEL_PARAMETERS, "init_adapter")


def set_parameter(spec: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The spec of a job with another value for a hyperparameter."""
    method = spec["method"]
    own = method.get(method["type"], {})
    changed = own | {"hyperparameters": own.get("hyperparameters", {}) | {name: value}}
    return spec | {"method": method | {method["type"]: changed}}


def find_dependents(session: Session, job: Job, *, indirect: bool) -> list[str]:
    """The ids of the jobs that need what `job` makes, upstream first."""
    reached, found = {job.stage}, []
    for stage in sorted(_stages_beside(session, job), key=lambda stage: stage.job_id):
        if reached.intersection(stage.needs.values()):
            found.append(stage.job_id)
            if indirect:
                reached.add(stage.name)
    return found


def with_dependents(session: Session, job_ids: Set[str]) -> list[str]:
    """`job_ids` and all that builds on them, in the order in which jobs are locked."""
    found = set(job_ids)
    members = select(Job).where(Job.id.in_(job_ids), Job.pipeline_id.is_not(None))
    for job in session.scalars(members):
        found.update(find_dependents(session, job, indirect=True))
    return sorted(found)


def take_output(session: Session, job: Job, *, upstream: Job) -> bool:
    """Give a waiting job what `upstream` has made. Returns whether everything that it needs is there now."""
    stages = {stage.name: stage for stage in _stages_beside(session, job)}
    needs = stages[str(job.stage)].needs
    made = session.scalars(
        select(Model).where(Model.id == upstream.fine_tuned_model, Model.job_id == upstream.id)
    ).one()
    for field, name in needs.items():
        if name != upstream.stage:
            continue
        if field == "model":
            job.model_pk, job.model_id = made.pk, made.id
        else:
            job.spec = set_parameter(job.spec, field, made.id)
    session.flush()
    needed = [stages[name].job_id for name in needs.values()]
    return set(session.scalars(select(Job.status).where(Job.id.in_(needed)))) == {"succeeded"}


def find_reader(session: Session, model: Model) -> str | None:
    """The id of an unfinished job that names `model` in a hyperparameter."""
    unfinished = scoped(Job, model.org_id).where(Job.status.not_in(JOB_TERMINAL))
    named = ((job.id, _models_named(job)) for job in session.scalars(unfinished))
    return next((job_id for job_id, models in named if model.id in models.values()), None)


def digest_inputs(session: Session, asked: NewJob | Job, *, model: Model, org_id: str) -> str | None:
    """A digest of all that decides what a job makes; None while some of it is not known."""
    digests: dict[str, str | None] = {"model": model.digest}
    readings: list[list[Any] | None] = []
    spec = asked.spec
    for name, model_id in _models_named(asked).items():
        digests[name] = session.scalar(
            scoped(Model, org_id).with_only_columns(Model.digest).where(Model.id == model_id)
        )
        spec = set_parameter(spec, name, "")  # another id may have the same digest
    for param, file_id in job_files.list_named(asked):
        file = session.scalar(scoped(File, org_id).where(File.id == file_id))
        digests[param] = file.sha256 if file else None
        readings.append(describe_reading(file) if file else None)
    if not all(digests.values()):
        return None
    inputs = [digests, readings, asked.spec_version, spec["method"], asked.seed, asked.resources]
    mixture = job_files.mixture_of(asked)
    if mixture:
        inputs.append([part | {"file": ""} for part in mixture])
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def record_inputs(session: Session, job: Job) -> None:
    """Note what a finished stage was made from, as long as all of it is there."""
    model = session.get_one(Model, job.model_pk)
    job.inputs_sha256 = digest_inputs(session, job, model=model, org_id=job.org_id)
    session.flush()


def find_finished(session: Session, inputs_sha256: str, *, org_id: str) -> Job | None:
    """The newest finished stage that was made from the same inputs and whose model is still there."""
    return session.scalar(
        scoped(Job, org_id)
        .join(Model, (Model.id == Job.fine_tuned_model) & (Model.job_id == Job.id))
        .where(
            Job.inputs_sha256 == inputs_sha256,
            Job.status == "succeeded",
            Model.deleted_at.is_(None),
            Model.status == "ready",
        )
        .order_by(Job.finished_at.desc(), Job.id)
        .limit(1)
    )


def _models_named(asked: NewJob | Job) -> dict[str, str]:
    given = asked.spec["method"].get(asked.method, {}).get("hyperparameters", {})
    return {name: given[name] for name in _NAMING_PARAMETERS if given.get(name) is not None}


def _stages_beside(session: Session, job: Job) -> list[PipelineStage]:
    return list(session.scalars(select(PipelineStage).where(PipelineStage.pipeline_id == job.pipeline_id)))
