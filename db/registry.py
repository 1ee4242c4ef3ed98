"""Models: imported bases and merged results, with their lineage."""

import shutil
from pathlib import Path
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db import deployments, tasks
from db.errors import Conflict, NotFound
from db.ids import random_text
from db.models import Deployment, Job, Model
from db.scope import owns, scoped
from db.session import Database, clock
from db.states import JOB_TERMINAL


def start_import(session: Session, *, org_id: str, model_id: str, source: str) -> Model:
    """Record a base model to be imported from `source` and queue the work.

    Raises `Conflict` if the id is taken; a failed import may be started again under the same id.
    """
    existing = session.scalar(scoped(Model, org_id).where(Model.id == model_id))
    if existing is not None and existing.status != "failed":
        raise _taken(model_id)
    if existing is not None:
        existing.deleted_at = clock(session)
        session.flush()
    model = Model(
        id=model_id,
        org_id=org_id,
        public=True,
        kind="base",
        status="importing",
        source=source,
        root_id=model_id,
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
        raise Conflict("model_not_ready", f"The model '{model_id}' is {model.status}.", param="model")
    return model


def list_all(session: Session, *, org_id: str) -> list[Model]:
    """All models the tenant may use or is importing, oldest first."""
    return list(session.scalars(scoped(Model, org_id).order_by(Model.created_at, Model.pk)))


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


def register_merged(
    session: Session, job: Job, *, path: Path, adapter_path: Path, report: dict[str, Any], org_name: str
) -> Model:
    """Register the merged result of `job`; both the merged folder and the adapter belong to the row."""
    parent = session.get_one(Model, job.model_pk)
    root = parent.root_id.replace("/", "--")
    merged = Model(
        id=f"ft:{root}:{org_name}:{job.suffix or ''}:{random_text(8)}",
        org_id=job.org_id,
        public=False,
        kind="merged",
        status="ready",
        source=f"job:{job.id}",
        path=str(path),
        digest=report["digest"],
        adapter_path=str(adapter_path),
        details={key: value for key, value in report.items() if key != "digest"},
        parent_id=parent.id,
        root_id=parent.root_id,
        job_id=job.id,
        created_at=clock(session),
    )
    session.add(merged)
    session.flush()
    return merged


def delete(database: Database, model_id: str, *, org_id: str) -> None:
    """Delete a fine-tuned model and its folder; the job record stays. Raises `NotFound`, `Conflict`."""
    with database.write() as session:
        model = session.scalar(scoped(Model, org_id).where(Model.id == model_id).with_for_update())
        if model is None:
            raise NotFound("model", model_id)
        # A public base belongs to all; only its owner may clear away one whose import failed.
        if not owns(model, org_id) or (model.kind == "base" and model.status != "failed"):
            raise Conflict("model_not_deletable", f"The base model '{model_id}' cannot be deleted here.")
        user = session.scalar(
            select(Job.id).where(Job.model_pk == model.pk, Job.status.not_in(JOB_TERMINAL)).limit(1)
        )
        served = session.scalar(
            select(Deployment.id)
            .where(
                Deployment.model_pk == model.pk,
                or_(Deployment.desired == "running", Deployment.status != "stopped"),
                Deployment.auto.is_(False),
            )
            .limit(1)
        )
        if user or served:
            raise Conflict("model_in_use", f"The model '{model_id}' is used by {user or served}.")
        for deployment in session.scalars(select(Deployment).where(Deployment.model_pk == model.pk)):
            deployments.end(session, deployment)
        model.deleted_at = clock(session)
        path = model.path
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)


def _taken(model_id: str) -> Conflict:
    return Conflict("model_exists", f"There is a model with the id '{model_id}' already.", param="id")
