"""Votes: of two answers to one prompt, which one was preferred."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy.orm import Session

from db.errors import NotFound
from db.ids import new_id
from db.models import Vote
from db.pages import Page, paginate
from db.scope import scoped
from db.session import clock

_READ_AT_ONCE = 500


def create(
    session: Session,
    *,
    org_id: str,
    prompt: list[Any],
    chosen: str,
    chosen_model: str,
    rejected: str,
    rejected_model: str,
) -> Vote:
    """Keep a vote; `prompt` is messages, the last one the user's."""
    vote = Vote(
        id=new_id("vote-"),
        org_id=org_id,
        prompt=prompt,
        chosen=chosen,
        chosen_model=chosen_model,
        rejected=rejected,
        rejected_model=rejected_model,
        created_at=clock(session),
    )
    session.add(vote)
    session.flush()
    return vote


def list_page(session: Session, *, org_id: str, after: str | None, limit: int) -> Page:
    """Votes, newest first."""
    return paginate(
        session,
        scoped(Vote, org_id),
        order_by=(Vote.created_at, Vote.id),
        id_column=Vote.id,
        after=after,
        limit=limit,
    )


def read_all(session: Session, *, org_id: str) -> Iterator[Vote]:
    """Every vote of the tenant, oldest first, some hundred in memory at a time."""
    every = scoped(Vote, org_id).order_by(Vote.created_at, Vote.id)
    yield from session.scalars(every.execution_options(yield_per=_READ_AT_ONCE))


def delete(session: Session, vote_id: str, *, org_id: str) -> None:
    """Take a vote back; files that were made of it stay. Raises `NotFound`."""
    vote = session.scalar(scoped(Vote, org_id).where(Vote.id == vote_id))
    if vote is None:
        raise NotFound("vote", vote_id)
    session.delete(vote)
    session.flush()
