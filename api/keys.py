"""/v1/keys: who may speak for the organisation."""

import logging

from fastapi import APIRouter

from api import render
from api.auth import AdminDep
from api.deps import After, DatabaseDep, Limit, SettingsDep
from api.schemas.common import Deleted
from api.schemas.keys import CreateKey, KeyList, KeyObject, NewKeyObject
from db import keys

router = APIRouter(prefix="/keys", tags=["Keys"])
logger = logging.getLogger(__name__)


@router.get("", summary="List keys")
def list_keys(caller: AdminDep, database: DatabaseDep, after: After = None, limit: Limit = 100) -> KeyList:
    """The keys of your organisation, newest first; revoked and expired ones too (admins)."""
    with database.read() as session:
        page = keys.list_page(session, org_id=caller.org_id, after=after, limit=limit)
    objects = [KeyObject.model_validate(render.key_fields(key)) for key in page.rows]
    return KeyList.model_validate(render.page(objects, has_more=page.has_more))


@router.post("", summary="Create key")
def create_key(
    body: CreateKey, caller: AdminDep, database: DatabaseDep, settings: SettingsDep
) -> NewKeyObject:
    """Make a key (admins). It is shown this once: a request that is sent again makes another."""
    with database.write() as session:
        key = keys.create(
            session,
            org_id=caller.org_id,
            name=body.name,
            role=body.role,
            expires_in_s=body.expires_in_s,
            pepper=settings.key_pepper.get_secret_value(),
        )
        row = keys.get(session, keys.id_of(key), org_id=caller.org_id)
    logger.info("key %s (%s) was made with key %s", row.id, row.role, caller.key_id)
    return NewKeyObject.model_validate(render.key_fields(row) | {"key": key})


@router.delete("/{key_id}", summary="Revoke key")
def revoke_key(key_id: str, caller: AdminDep, database: DatabaseDep) -> Deleted:
    """Let a key open nothing any more, at once (admins). The last admin key that works stays."""
    with database.write() as session:
        keys.revoke(session, key_id, org_id=caller.org_id)
    logger.info("key %s was revoked with key %s", key_id, caller.key_id)
    return Deleted(id=key_id, object="key")
