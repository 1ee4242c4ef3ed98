"""Creating once: a request that is sent again, knowingly or blindly, gets the first answer again."""

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Header, Response
from sqlalchemy.orm import Session

from api.auth import CallerDep
from api.deps import DatabaseDep
from db import idempotency

# The official clients send a create again when its answer is late or lost, and no key with it.
_BLIND_RETRY_WINDOW_S = 600.0


class Once:
    """Gives each create request its effect once, by the key it carries or by what it asks for."""

    def __init__(
        self,
        database: DatabaseDep,
        caller: CallerDep,
        response: Response,
        idempotency_key: Annotated[
            str | None,
            Header(
                alias="Idempotency-Key",
                min_length=1,
                max_length=255,
                description="The same key with the same body gives the first answer again, and does nothing.",
            ),
        ] = None,
        x_stainless_retry_count: Annotated[str, Header(include_in_schema=False)] = "0",
    ) -> None:
        self._database, self._caller, self._response = database, caller, response
        self._key = idempotency_key
        self._is_retry = x_stainless_retry_count.isdecimal() and int(x_stainless_retry_count) > 0

    def answer(
        self, make: Callable[[Session], dict[str, Any]], *, request: tuple[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """What `make` answers, or answered, remembered in the transaction that makes it true.

        `request` is the route and the body. A replay says so in the header `idempotency-replayed`. Raises
        `Conflict` when the key was used for another request.
        """
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        # A header cannot hold a line break, so no client's key can be one of ours.
        key = self._key or f"blind\n{self._caller.key_id}\n{digest}"
        org_id = self._caller.org_id
        with self._database.write() as session:
            idempotency.hold(session, org_id=org_id, key=key)
            if self._key is not None or self._is_retry:
                known = idempotency.recall(
                    session,
                    org_id=org_id,
                    key=key,
                    request_hash=digest,
                    max_age_s=None if self._key else _BLIND_RETRY_WINDOW_S,
                )
                if known is not None:
                    self._response.headers["idempotency-replayed"] = "true"
                    return known
            answer = make(session)
            idempotency.remember(session, org_id=org_id, key=key, request_hash=digest, response=answer)
            return answer


OnceDep = Annotated[Once, Depends()]
