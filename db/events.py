"""What happened to a job, in order, as the user will read it."""

from collections.abc import Iterator, Set
from typing import Any

from sqlalchemy import Text, cast, func, select
from sqlalchemy.orm import Session

from db.ids import new_id
from db.models import Event, Job
from db.pages import Page, paginate
from db.scope import scoped
from db.session import timestamp


def add(
    session: Session,
    job: Job,
    message: str,
    *,
    level: str = "info",
    type_: str = "message",
    data: dict[str, Any] | None = None,
    locked: bool = False,
) -> None:
    """Append an event to the history of `job`, whose row may be `locked` by this transaction already."""
    # PostgreSQL numbers rows before they are committed; whoever reads after number 8 must not miss a late 7.
    if not locked:
        session.execute(select(Job.id).where(Job.id == job.id).with_for_update())
    session.add(
        Event(
            id=new_id("ftevent-"),
            org_id=job.org_id,
            job_id=job.id,
            level=level,
            type=type_,
            message=message,
            data=data or {},
            created_at=timestamp(session),
        )
    )
    session.flush()


def list_page(
    session: Session,
    *,
    org_id: str,
    job_id: str,
    after: str | None,
    limit: int,
    descending: bool = True,
    type_: str | None = None,
) -> Page:
    """Events of a job, or those of one type, newest first unless told otherwise."""
    chosen = scoped(Event, org_id).where(Event.job_id == job_id)
    return paginate(
        session,
        chosen if type_ is None else chosen.where(Event.type == type_),
        order_by=(Event.seq,),
        id_column=Event.id,
        after=after,
        limit=limit,
        descending=descending,
    )


def latest(session: Session, job_ids: Set[str]) -> dict[str, int]:
    """The `seq` of the newest event of each of these jobs."""
    # A subquery a job, not one grouping for all: each is then a single step in the index.
    newest = select(func.max(Event.seq)).where(Event.job_id == Job.id).scalar_subquery()
    rows = session.execute(select(Job.id, newest).where(Job.id.in_(job_ids)))
    return {job_id: seq for job_id, seq in rows if seq is not None}


def all_metrics(session: Session, job_id: str) -> Iterator[dict[str, Any]]:
    """The data of every metrics event of a job, in order."""
    yield from session.scalars(
        select(Event.data).where(Event.job_id == job_id, Event.type == "metrics").order_by(Event.seq)
    )


def metrics_texts(session: Session, job_id: str) -> list[str]:
    """The same as JSON texts, for whoever reads thousands of them at once."""
    return list(
        session.scalars(
            select(cast(Event.data, Text))
            .where(Event.job_id == job_id, Event.type == "metrics")
            .order_by(Event.seq)
        )
    )


def describe_metrics(step: int, total_steps: int, data: dict[str, Any]) -> str:
    """The one-line reading of a metrics record, in the words of OpenAI's events."""
    named = (
        ("training loss", data.get("train_loss")),
        ("validation loss", data.get("valid_loss")),
        ("full validation loss", data.get("full_valid_loss")),
    )
    parts = [f"{name}={value:.4f}" for name, value in named if value is not None]
    return f"Step {step}/{total_steps}" + (": " + ", ".join(parts) if parts else "")
