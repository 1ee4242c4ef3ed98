"""Who is calling. Nothing under /v1 is reached without a key."""

from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.deps import DatabaseDep, SettingsDep
from api.errors import ApiError
from db import keys
from db.keys import Caller

_bearer = HTTPBearer(auto_error=False, description="A key, such as the one that `residency up` makes.")


def authenticate(
    database: DatabaseDep,
    settings: SettingsDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
) -> Caller:
    """Whom the bearer key speaks for. Raises ApiError (401)."""
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
    return caller


CallerDep = Annotated[Caller, Depends(authenticate)]


def require_admin(caller: CallerDep) -> Caller:
    """A caller with an admin key. Raises ApiError (403)."""
    if caller.role != "admin":
        raise ApiError(403, "insufficient_permissions", "This request needs an admin key.")
    return caller


AdminDep = Annotated[Caller, Depends(require_admin)]


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
