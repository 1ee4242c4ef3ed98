"""What routes ask for: the settings, the database, and answers that are given once."""

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.settings import ApiSettings
from db import idempotency
from db.session import Database


def get_settings(request: Request) -> ApiSettings:
    """The settings the app was made with."""
    return request.app.state.settings


def get_database(request: Request) -> Database:
    """The database the app was made with."""
    return request.app.state.database


SettingsDep = Annotated[ApiSettings, Depends(get_settings)]
DatabaseDep = Annotated[Database, Depends(get_database)]
After = Annotated[str | None, Query(description="Id of the last object of the page before.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key with the same body gives the first answer again, and does nothing.",
    ),
]


def answer_once(
    database: Database,
    make: Callable[[Session], dict[str, Any]],
    *,
    org_id: str,
    key: str | None,
    request: tuple[str, dict[str, Any]],
) -> tuple[dict[str, Any], bool]:
    """What `make` answers, remembered under `key` in the same transaction; and whether it is a replay.

    `request` is the route and the body. Raises `Conflict` when the key was used for another one.
    """
    if key is None:
        with database.write() as session:
            return make(session), False
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    try:
        with database.write() as session:
            known = idempotency.recall(session, org_id=org_id, key=key, request_hash=digest)
            if known is not None:
                return known, True
            answer = make(session)
            idempotency.remember(session, org_id=org_id, key=key, request_hash=digest, response=answer)
            return answer, False
    except IntegrityError:
        # Another request with this key committed first: what this one made is rolled back.
        with database.read() as session:
            known = idempotency.recall(session, org_id=org_id, key=key, request_hash=digest)
        if known is None:
            raise
        return known, True
