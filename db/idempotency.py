"""One answer for one `Idempotency-Key`, however often and however concurrently it is asked."""

from typing import Any

from sqlalchemy.orm import Session

from db.errors import Conflict
from db.models import IdempotentRequest
from db.scope import scoped
from db.session import clock


def recall(session: Session, *, org_id: str, key: str, request_hash: str) -> dict[str, Any] | None:
    """The answer given before under `key`, or None. Raises `Conflict` when the request was another one."""
    row = session.scalar(scoped(IdempotentRequest, org_id).where(IdempotentRequest.key == key))
    if row is None:
        return None
    if row.request_hash != request_hash:
        raise Conflict("idempotency_key_reused", "This Idempotency-Key was used for a different request.")
    return row.response


def remember(session: Session, *, org_id: str, key: str, request_hash: str, response: dict[str, Any]) -> None:
    """Store the answer in the transaction that makes it true. IntegrityError: another request was faster."""
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
