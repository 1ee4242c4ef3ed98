"""/v1/prepared: training data as token ids, which jobs share."""

from fastapi import APIRouter

from api.auth import AdminDep
from api.deps import SettingsDep
from api.errors import ApiError
from api.schemas.files import PreparedList, PreparedObject
from db import keys, prepared

router = APIRouter(prefix="/prepared", tags=["Files"])


@router.get("", summary="List prepared data")
def list_prepared(caller: AdminDep, settings: SettingsDep) -> PreparedList:
    """What jobs have made of their data, and what later jobs on the same use again (admins of the host)."""
    if caller.org_id != keys.DEFAULT_ORG_ID:
        message = "Prepared data is of all organisations together."
        raise ApiError(403, "insufficient_permissions", message)
    return PreparedList(
        data=[
            PreparedObject(
                id=one.id,
                bytes=one.bytes,
                rows=one.rows,
                tokens=one.tokens,
                used_at=int(one.used_at),
                expires_at=int(one.used_at + settings.prepared_unused_s),
            )
            for one in prepared.list_prepared(settings.cache_dir)
        ],
    )
