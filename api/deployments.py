"""/v1/deployments: which models answer."""

from typing import Annotated

from fastapi import APIRouter, Query

from api import render
from api.auth import CallerDep
from api.deps import After, DatabaseDep
from api.schemas.common import Deleted
from api.schemas.deployments import CreateDeployment, DeploymentList, DeploymentObject
from db import deployments, registry

router = APIRouter(prefix="/deployments", tags=["Deployments"])


@router.post("", summary="Create deployment")
def create_deployment(body: CreateDeployment, caller: CallerDep, database: DatabaseDep) -> DeploymentObject:
    """Have a model answer. The live deployment of a model is given again; a failed one is tried again."""
    with database.write() as session:
        model = registry.get_ready(session, body.model, org_id=caller.org_id, hold=True)
        deployment = deployments.ensure(session, model, org_id=caller.org_id, auto=False)
        return render.deployment_object(deployment, caller)


@router.get("", summary="List deployments")
def list_deployments(
    caller: CallerDep,
    database: DatabaseDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> DeploymentList:
    """Your deployments, newest first; stopped ones too."""
    with database.read() as session:
        page = deployments.list_page(session, org_id=caller.org_id, after=after, limit=limit)
    objects = [render.deployment_object(row, caller) for row in page.rows]
    return DeploymentList.model_validate(render.page(objects, has_more=page.has_more))


@router.get("/{deployment_id}", summary="Retrieve deployment")
def retrieve_deployment(deployment_id: str, caller: CallerDep, database: DatabaseDep) -> DeploymentObject:
    """A deployment and whether it answers."""
    with database.read() as session:
        return render.deployment_object(deployments.get(session, deployment_id, org_id=caller.org_id), caller)


@router.delete("/{deployment_id}", summary="Delete deployment")
def delete_deployment(deployment_id: str, caller: CallerDep, database: DatabaseDep) -> Deleted:
    """Stop a deployment. Its model stays."""
    with database.write() as session:
        deployments.stop(session, deployment_id, org_id=caller.org_id)
    return Deleted(id=deployment_id, object="deployment")
