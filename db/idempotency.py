"""One answer for one key, however often and however concurrently it is asked."""

import hashlib
from typing import Any

from sqlalchemy import delete
from sqlalchemy.orm import Session

from db.errors import Conflict
from db.models import IdempotentRequest
from db.scope import scoped
from db.session import clock, lock_digest

KEPT_S = 24 * 3600.0


def hold(session: Session, *, org_id: str, key: str) -> None:
    """Make other requests with this key wait until the commit. Comes before `recall` and `remember`."""
    lock_digest(session, hashlib.sha256(f"{org_id}\n{key}".encode()).hexdigest())


def recall(
    session: Session, *, org_id: str, key: str, request_hash: str, max_age_s: float | None = None
) -> dict[str, Any] | None:
    """The answer given before under `key`, or None. Raises `Conflict` when the request was another one."""
    row = session.scalar(scoped(IdempotentRequest, org_id).where(IdempotentRequest.key == key))
    if row is None or clock(session) - row.created_at > (max_age_s or KEPT_S):
        return None
    if row.request_hash != request_hash:
        raise Conflict("idempotency_key_reused", "This Idempotency-Key was used for a different request.")
    return row.response


def remember(session: Session, *, org_id: str, key: str, request_hash: str, response: dict[str, Any]) -> None:
    """Store the answer in the transaction that makes it true, in place of one that is no longer recalled."""
    older = scoped(IdempotentRequest, org_id).where(IdempotentRequest.key == key)
    for row in session.scalars(older):
        session.delete(row)
    session.flush()
    session.add(
        IdempotentRequest(
            org_id=org_id,
            key=key,
            request_hash=request_hash,
            response=response,
            created_at=clock(session),
        )
    )
    session.flush()


def forget_old(session: Session) -> None:
    """Drop the answers that are too old to be given again."""
    session.execute(delete(IdempotentRequest).where(IdempotentRequest.created_at < clock(session) - KEPT_S))
