"""/healthz and /readyz: for supervisors and load balancers, without a key."""

from typing import Literal

from fastapi import APIRouter, Response
from kombu.exceptions import OperationalError as BrokerError
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from api.deps import DatabaseDep
from db.session import Database
from db.tables import Org
from workers import dispatch

router = APIRouter(tags=["Health"])
_BROKER_WAIT_S = 2.0


class Health(BaseModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether requests can be answered, part by part."""

    status: Literal["ready", "unavailable"]
    database: Literal["ok", "down"]
    broker: Literal["ok", "down"]


@router.get("/healthz", summary="Is the process up?")
async def healthz() -> Health:
    """Says ok as long as the process can speak."""
    return Health()


@router.get("/readyz", summary="Can requests be answered?", responses={503: {"model": Readiness}})
def readyz(database: DatabaseDep, response: Response) -> Readiness:
    """503 unless the database answers. The broker is only reported: losing it delays work, no more."""
    database_ok = _database_answers(database)
    if not database_ok:
        response.status_code = 503
    return Readiness(
        status="ready" if database_ok else "unavailable",
        database="ok" if database_ok else "down",
        broker="ok" if broker_answers() else "down",
    )


def _database_answers(database: Database) -> bool:
    try:
        with database.read() as session:
            session.execute(select(Org.id).limit(1))
    except SQLAlchemyError:
        return False
    return True


def broker_answers() -> bool:
    """Whether a message could be sent now."""
    with dispatch.app.connection_for_write(connect_timeout=_BROKER_WAIT_S) as connection:
        try:
            connection.ensure_connection(max_retries=0)
        except BrokerError:
            return False
    return True
