"""What models and methods see in files: each question is put to a worker once, its answer kept for a day."""

import hashlib
import json
from collections.abc import Collection
from typing import Any, Literal

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from db import tasks
from db.ids import new_id
from db.models import File, Model, Preview
from db.scope import scoped
from db.session import clock, lock_digest

ID_PREFIX = "preview-"
KEPT_S = 24 * 3600.0
FAILED_KEPT_S = 60.0  # then it is tried again
_VERSION = 1  # raise it when the same question would be answered otherwise
FAILED_CODE = "preview_failed"
OUR_FAULTS = (FAILED_CODE, "content_corrupt")
_FAILED = {
    "code": FAILED_CODE,
    "message": "The file could not be looked at: the worker broke on every attempt.",
    "param": None,
}


def name_question(kind: Literal["rows", "tokens"], file: File, model: Model, *, asked: dict[str, Any]) -> str:
    """The key of what these decide: the bytes, the model with its tokenizer, the method and the rest."""
    facts = [_VERSION, kind, file.sha256, model.digest, asked]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def find(session: Session, key: str, *, org_id: str) -> Preview | None:
    """The question of this name, if it was put and its answer may still be given."""
    return session.scalar(
        scoped(Preview, org_id).where(Preview.key == key, Preview.expires_at > clock(session))
    )


def ask(
    session: Session,
    key: str,
    *,
    kind: Literal["rows", "tokens"],
    file: File,
    model: Model,
    asked: dict[str, Any],
) -> Preview:
    """Put a question to the workers, unless somebody else has; before other work, for somebody waits."""
    org_id = file.org_id
    lock_digest(session, key)
    found = find(session, key, org_id=org_id)
    if found is not None:
        return found
    for stale in session.scalars(scoped(Preview, org_id).where(Preview.key == key)):
        session.delete(stale)
    session.flush()
    now = clock(session)
    preview = Preview(
        id=new_id(ID_PREFIX),
        org_id=org_id,
        kind=kind,
        key=key,
        sha256=file.sha256,
        request={"model_pk": model.pk, "asked": asked},
        created_at=now,
        expires_at=now + KEPT_S,
    )
    session.add(preview)
    session.flush()
    tasks.enqueue(session, kind="preview", subject_id=preview.id, org_id=org_id, max_attempts=2, priority=1)
    return preview


def answered(session: Session, ids: Collection[str]) -> set[str]:
    """Which of these have their answer."""
    return set(session.scalars(select(Preview.id).where(Preview.id.in_(ids), Preview.answer.is_not(None))))


def record(session: Session, preview_id: str, answer: dict[str, Any]) -> None:
    """Store an answer; it is passed over where the question is forgotten.

    One that is our fault is kept for a minute only: then it may be mended.
    """
    is_ours = (answer.get("error") or {}).get("code") in OUR_FAULTS
    preview = session.get(Preview, preview_id, with_for_update=True, populate_existing=True)
    if preview is not None:
        preview.answer, preview.expires_at = answer, clock(session) + (FAILED_KEPT_S if is_ours else KEPT_S)
        session.flush()


def fail(session: Session, preview_id: str) -> None:
    """No worker could answer; whoever asks in the next minute is told so."""
    record(session, preview_id, {"error": _FAILED})


def forget(session: Session, preview_id: str) -> None:
    """Drop a question that cannot be answered any more: what it asks about is gone."""
    session.execute(delete(Preview).where(Preview.id == preview_id))


def forget_content(session: Session, sha256: str, *, org_id: str) -> None:
    """Drop what is known of a tenant's bytes."""
    for preview in session.scalars(scoped(Preview, org_id).where(Preview.sha256 == sha256)):
        session.delete(preview)
    session.flush()


def forget_old(session: Session) -> None:
    """Drop what may no longer be given, and the traces of the work behind it."""
    now = clock(session)
    session.execute(delete(Preview).where(Preview.expires_at <= now))
    tasks.forget_closed(session, kind="preview", before=now - KEPT_S)
