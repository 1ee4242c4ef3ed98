"""Which models should answer, and what the serving nodes report of them."""

from typing import Any

from sqlalchemy import Select, exists, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.errors import Conflict, NotFound
from db.ids import new_id
from db.models import Deployment, Model
from db.pages import Page, paginate
from db.scope import scoped
from db.session import clock

_UNCLAIMED = (Deployment.node.is_(None), Deployment.desired == "running", Deployment.status == "pending")


def ensure(session: Session, model: Model, *, org_id: str, auto: bool) -> Deployment:
    """The live deployment of `model`, made if there is none.

    An automatic one becomes the user's when a user asks for it; one that failed is tried again. Raises
    `Conflict` for a model that does not answer.
    """
    if (model.details or {}).get("head") == "score":
        message = f"'{model.id}' is a reward model: it judges answers and gives none."
        raise Conflict("model_not_chat", message, param="model")
    live = session.scalar(_live(model, org_id=org_id))
    if live is None:
        try:
            with session.begin_nested():
                live = _add(session, model, org_id=org_id, auto=auto)
        except IntegrityError:  # another request made it a moment ago
            live = session.scalars(_live(model, org_id=org_id)).one()
    if live.auto and not auto:
        live.auto = False
    if live.status == "failed":
        live.status, live.error, live.restarts = "pending", None, 0
    live.last_used_at = clock(session)
    session.flush()
    return live


def find_live(session: Session, model: Model, *, org_id: str) -> Deployment | None:
    """The deployment of `model` that is or should be running."""
    return session.scalar(_live(model, org_id=org_id))


def get(session: Session, deployment_id: str, *, org_id: str) -> Deployment:
    """Raises `NotFound`."""
    found = session.scalar(scoped(Deployment, org_id).where(Deployment.id == deployment_id))
    if found is None:
        raise NotFound("deployment", deployment_id)
    return found


def list_page(session: Session, *, org_id: str, after: str | None, limit: int) -> Page:
    """Deployments, newest first; stopped ones too."""
    return paginate(
        session,
        scoped(Deployment, org_id),
        order_by=(Deployment.created_at, Deployment.id),
        id_column=Deployment.id,
        after=after,
        limit=limit,
    )


def stop(session: Session, deployment_id: str, *, org_id: str) -> Deployment:
    """Ask for the end of a deployment. Raises `NotFound`."""
    found = get(session, deployment_id, org_id=org_id)
    end(session, found)
    return found


def end(session: Session, deployment: Deployment) -> None:
    """The node ends the engine at its next look; a deployment that never reached a node is over at once."""
    deployment.desired = "stopped"
    if deployment.node is None and deployment.status != "stopped":
        deployment.status, deployment.stopped_at = "stopped", clock(session)
    session.flush()


def touch(session: Session, deployment_id: str) -> None:
    """Note that a request used the deployment; the least recently used one gives way first."""
    session.execute(
        update(Deployment).where(Deployment.id == deployment_id).values(last_used_at=clock(session))
    )


def any_unclaimed(session: Session) -> bool:
    """Whether a pending deployment waits for a node."""
    return bool(session.scalar(select(exists().where(*_UNCLAIMED))))


def adopt(session: Session, *, node: str) -> None:
    """Take the pending deployments that no node has yet."""
    session.execute(
        update(Deployment).where(*_UNCLAIMED).values(node=node).execution_options(synchronize_session=False)
    )


def of_node(session: Session, *, node: str) -> list[tuple[Deployment, Model]]:
    """The node's deployments that are not over, with their models, least recently used first."""
    rows = session.execute(
        select(Deployment, Model)
        .join(Model, Model.pk == Deployment.model_pk)
        .where(Deployment.node == node, Deployment.status != "stopped")
        .order_by(Deployment.last_used_at, Deployment.id)
    )
    return [(deployment, model) for deployment, model in rows]


def report(
    session: Session,
    deployment_id: str,
    *,
    status: str,
    address: str | None = None,
    error: dict[str, Any] | None = None,
    restarts: int | None = None,
) -> None:
    """What the node's reconciler saw of an engine."""
    values: dict[str, Any] = {"status": status, "address": address, "error": error}
    if restarts is not None:
        values["restarts"] = restarts
    if status == "stopped":
        values |= {"stopped_at": clock(session), "desired": "stopped"}
    session.execute(update(Deployment).where(Deployment.id == deployment_id).values(**values))


def _live(model: Model, *, org_id: str) -> Select[Deployment]:
    return scoped(Deployment, org_id).where(Deployment.model_pk == model.pk, Deployment.desired == "running")


def _add(session: Session, model: Model, *, org_id: str, auto: bool) -> Deployment:
    now = clock(session)
    deployment = Deployment(
        id=new_id("dep-"),
        org_id=org_id,
        model_id=model.id,
        model_pk=model.pk,
        auto=auto,
        desired="running",
        status="pending",
        restarts=0,
        created_at=now,
        last_used_at=now,
    )
    session.add(deployment)
    session.flush()
    return deployment
