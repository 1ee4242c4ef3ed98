"""/v1/models: bases and fine-tuned models."""

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, BackgroundTasks
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api import render
from api.auth import AdminDep, CallerDep
from api.deps import DatabaseDep, SettingsDep
from api.errors import ApiError
from api.once import OnceDep
from api.schemas.common import Deleted
from api.schemas.models import ImportModel, ModelList, ModelObject
from api.settings import ApiSettings
from api.sources import check_hub
from db import adapters, registry, sources
from db.errors import Conflict, NotFound
from db.models import Model
from workers.dispatch import ring

router = APIRouter(prefix="/models", tags=["Models"])


@router.get("", summary="List models")
def list_models(caller: CallerDep, database: DatabaseDep) -> ModelList:
    """All models you may use, oldest first."""
    with database.read() as session:
        models = registry.list_all(session, org_id=caller.org_id)
    return ModelList(data=[render.model_object(model, caller) for model in models])


# Before the routes with an id, since ids may hold slashes.
@router.post("/import", summary="Import model")
def import_model(
    body: ImportModel, caller: AdminDep, settings: SettingsDep, once: OnceDep, background: BackgroundTasks
) -> ModelObject:
    """Import a model, or an adapter for one, from the worker's disk or a hub (admins). Watch `status`."""
    if not settings.import_enabled:
        raise ApiError(403, "insufficient_permissions", "Imports are switched off here.")
    given = _read_sources(body, settings)

    def make(session: Session) -> dict[str, Any]:
        if body.adapters is not None:
            adapters.check_chain(session, given, base_id=str(body.base), org_id=caller.org_id)
        model = registry.start_import(
            session,
            org_id=caller.org_id,
            model_id=body.id,
            source=sources.join(given),
            base_id=body.base,
        )
        return render.model_object(model, caller).model_dump(mode="json")

    try:
        answer = once.answer(make, request=("POST /v1/models/import", body.model_dump(mode="json")))
    except NotFound as error:
        raise ApiError(404, "model_not_found", f"The base: {error}", param="base") from error
    except IntegrityError as error:  # another request imports it since a moment ago
        message = f"There is a model with the id '{body.id}' already."
        raise Conflict("model_exists", message, param="id") from error
    background.add_task(ring, "cpu")
    return ModelObject.model_validate(answer)


def _read_sources(body: ImportModel, settings: ApiSettings) -> list[str]:
    """What is to be imported, in order. Raises ApiError for what contradicts itself."""
    if body.source is not None and body.adapters is not None:
        message = "Give either 'source' or 'adapters'."
        raise ApiError(400, "invalid_value", message, param="adapters")
    if body.source is not None and sources.is_job(body.source):
        message = "The id of a job goes into 'adapters', beside the 'base' that its adapter is for."
        raise ApiError(400, "invalid_value", message, param="source")
    given = [body.source] if body.source is not None else body.adapters
    missing = "source" if given is None else "base" if body.adapters and body.base is None else None
    if given is None or missing is not None:
        message = f"Missing required parameter: '{missing}'."
        raise ApiError(400, "missing_required_parameter", message, param=missing)
    return [
        str(check_hub(source, settings, param="source" if body.adapters is None else f"adapters.{position}"))
        if sources.is_hub(source)
        else source
        for position, source in enumerate(given)
    ]


@router.get("/{model_id:path}", summary="Retrieve model")
def retrieve_model(model_id: str, caller: CallerDep, database: DatabaseDep) -> ModelObject:
    """A model, its lineage, and what its training made of it."""
    with database.read() as session:
        model = registry.get(session, model_id, org_id=caller.org_id)
        lineage = render.lineage(registry.trace(session, model))
    return render.model_object(model, caller, evaluation=_read_evaluation(model), lineage=lineage)


def _read_evaluation(model: Model) -> dict[str, Any] | None:
    """What training left beside the weights that it made; None where it left nothing."""
    folder = {"merged": model.path, "checkpoint": model.adapter_path}.get(model.kind)
    if folder is None:
        return None
    try:
        return json.loads((Path(folder) / "evaluation.json").read_bytes())
    except (
        FileNotFoundError
    ):  # nothing was held out and nothing asked, or the model is deleted at this moment
        return None


@router.delete("/{model_id:path}", summary="Delete model")
def delete_model(model_id: str, caller: CallerDep, database: DatabaseDep) -> Deleted:
    """Delete a fine-tuned model, or (admins) what is left of a failed import."""
    with database.read() as session:
        model = registry.get(session, model_id, org_id=caller.org_id)
    if model.kind == "base" and caller.role != "admin":
        raise Conflict("model_not_deletable", f"The base model '{model_id}' cannot be deleted here.")
    registry.delete(database, model_id, org_id=caller.org_id)
    return Deleted(id=model_id, object="model")
