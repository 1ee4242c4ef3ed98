"""/v1/pipelines: several trainings as one submission, each starting from what others make."""

import hashlib
import json
from typing import Any

from fastapi import APIRouter, BackgroundTasks
from sqlalchemy.orm import Session

from api import render
from api.auth import CallerDep
from api.deps import After, DatabaseDep, Limit
from api.jobs import describe_job, seed_of
from api.once import OnceDep
from api.schemas.pipelines import (
    CreatePipeline,
    CreateStage,
    PipelineList,
    PipelineObject,
    StageRef,
    read_reference,
)
from db import pipelines
from db.pipelines import NewStage
from db.stages import MODEL_PARAMETERS
from trainers.specs import Method, SpecError, parse_method
from trainers.specs.names import ALIASES
from workers.dispatch import ring

router = APIRouter(prefix="/pipelines", tags=["Pipelines"])


@router.post("", summary="Create pipeline")
def create_pipeline(
    body: CreatePipeline, caller: CallerDep, once: OnceDep, background: BackgroundTasks
) -> PipelineObject:
    """Start a pipeline. Finished stages of older ones are reused where all their inputs are the same."""
    new_stages = [_read_stage(stage, position) for position, stage in enumerate(body.stages)]

    def make(session: Session) -> dict[str, Any]:
        pipeline = pipelines.create(session, new_stages, name=body.name, org_id=caller.org_id)
        background.add_task(ring, "train")
        background.add_task(ring, "cpu")
        return _show(session, pipeline.id, org_id=caller.org_id).model_dump(mode="json")

    asked = body.model_dump(mode="json", exclude_unset=True)
    return PipelineObject.model_validate(once.answer(make, request=("POST /v1/pipelines", asked)))


@router.get("", summary="List pipelines")
def list_pipelines(
    caller: CallerDep, database: DatabaseDep, after: After = None, limit: Limit = 20
) -> PipelineList:
    """Your pipelines, newest first."""
    with database.read() as session:
        page = pipelines.list_page(session, org_id=caller.org_id, after=after, limit=limit)
        stages = pipelines.stages_of(session, page.rows, org_id=caller.org_id)
    shown = [render.pipeline_object(pipeline, stages[pipeline.id]) for pipeline in page.rows]
    return PipelineList(data=shown, has_more=page.has_more)


@router.get("/{pipeline_id}", summary="Retrieve pipeline")
def retrieve_pipeline(pipeline_id: str, caller: CallerDep, database: DatabaseDep) -> PipelineObject:
    """A pipeline and how far its stages are."""
    with database.read() as session:
        return _show(session, pipeline_id, org_id=caller.org_id)


@router.post("/{pipeline_id}/cancel", summary="Cancel pipeline")
def cancel_pipeline(pipeline_id: str, caller: CallerDep, database: DatabaseDep) -> PipelineObject:
    """Cancel every stage that is not over. One that runs keeps its status until its worker has stopped."""
    with database.write() as session:
        pipelines.cancel(session, pipeline_id, org_id=caller.org_id)
        return _show(session, pipeline_id, org_id=caller.org_id)


def _show(session: Session, pipeline_id: str, *, org_id: str) -> PipelineObject:
    pipeline = pipelines.get(session, pipeline_id, org_id=org_id)
    stages = pipelines.stages_of(session, [pipeline], org_id=org_id)
    return render.pipeline_object(pipeline, stages[pipeline_id])


def _read_stage(stage: CreateStage, position: int) -> NewStage:
    asked, needs = _take_references(stage.method)
    model = stage.model
    if isinstance(model, StageRef):
        needs = {"model": model.stage, **needs}
        model = model.stage  # until it is known what its result is called
    try:
        method = parse_method(asked, None)
        chosen = seed_of(stage, method)
        seed = _derive_seed(method) if chosen is None else chosen
        return NewStage(stage.name, describe_job(stage, method, model=model, seed=seed), needs)
    except SpecError as error:
        path = f"stages.{position}" + (f".{error.param}" if error.param else "")
        raise SpecError(error.message, param=path, code=error.code) from error


def _take_references(method: dict[str, Any] | None) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The method with the names of stages in place of references to them, and which these are."""
    kind = str(method.get("type")) if method else ""
    body = method.get(kind) if method else None
    given = body.get("hyperparameters") if isinstance(body, dict) else None
    if not method or not isinstance(body, dict) or not isinstance(given, dict):
        return method, {}
    references = {
        name: reference.stage
        for name, value in given.items()
        if ALIASES.get(name, name) in MODEL_PARAMETERS and (reference := read_reference(value)) is not None
    }
    needs = {str(ALIASES.get(name, name)): stage for name, stage in references.items()}
    return method | {kind: body | {"hyperparameters": given | references}}, needs


def _derive_seed(method: Method) -> int:
    """The same for the same wishes, so that a pipeline that is run again finds what it has made before."""
    wishes = json.dumps(method.to_request(), sort_keys=True)
    return int.from_bytes(hashlib.sha256(wishes.encode()).digest()[:4]) >> 1
