"""Who is calling. Nothing under /v1 is reached without a key."""

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.deps import DatabaseDep, SettingsDep, get_database, get_settings
from api.errors import ApiError
from api.key_uses import KeyUses
from db import keys
from db.keys import Caller

_CALLER = "residency.caller"
_bearer = HTTPBearer(auto_error=False, description="A key, such as the one that `residency up` makes.")


def authenticate(
    request: Request,
    database: DatabaseDep,
    settings: SettingsDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
) -> Caller:
    """Whom the bearer key speaks for. Raises ApiError (401)."""
    if _CALLER in request.scope:
        return request.scope[_CALLER]
    if credentials is None:
        raise _unauthorized(
            "You didn't provide an API key. You need to provide your API key in an Authorization header "
            "using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
        )
    with database.read() as session:
        caller = keys.authenticate(
            session, credentials.credentials, pepper=settings.key_pepper.get_secret_value()
        )
    if caller is None:
        raise _unauthorized("Incorrect API key provided.")
    uses: KeyUses = request.app.state.key_uses
    uses.note(caller.key_id)
    return caller


class KeyFirst:
    """Asks for the key before anybody reads a body: the framework reads JSON before a route asks."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises ApiError (401)."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and _has_body(Headers(scope=scope)):
            request = Request(scope)
            scope[_CALLER] = await run_in_threadpool(
                authenticate,
                request,
                get_database(request),
                get_settings(request),
                await _bearer(request),
            )
        await self._app(scope, receive, send)


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


CallerDep = Annotated[Caller, Depends(authenticate)]


def require_admin(caller: CallerDep) -> Caller:
    """A caller with an admin key. Raises ApiError (403)."""
    if caller.role != "admin":
        raise ApiError(403, "insufficient_permissions", "This request needs an admin key.")
    return caller


AdminDep = Annotated[Caller, Depends(require_admin)]


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
