"""Bearer keys: `rsd_<role>_<id>_<43 random>_<crc>`. Stored as an HMAC, compared in constant time."""

import hmac
import re
import secrets
import zlib
from dataclasses import dataclass

from sqlalchemy import func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.errors import Conflict, NotFound
from db.ids import random_text
from db.models import ApiKey
from db.pages import Page, paginate
from db.scope import scoped
from db.session import clock
from db.tables import Org

_FORM = re.compile(r"rsd_(admin|user)_([A-Za-z0-9]{12})_([A-Za-z0-9_-]{43})_([0-9a-f]{8})")
_MIN_PEPPER_CHARS = 32
DEFAULT_ORG_ID = "org-default"


@dataclass(frozen=True)
class Caller:
    """Whom a valid key speaks for."""

    org_id: str
    org_name: str
    key_id: str
    role: str


def ensure_default_org(session: Session) -> Org:
    """The organisation that a fresh installation has."""
    org = session.get(Org, DEFAULT_ORG_ID)
    if org is not None:
        return org
    org = Org(id=DEFAULT_ORG_ID, name="default", created_at=clock(session))
    try:
        with session.begin_nested():
            session.add(org)
    except IntegrityError:  # another process made it a moment ago
        return session.get_one(Org, DEFAULT_ORG_ID)
    return org


def create(
    session: Session, *, org_id: str, name: str, role: str, pepper: str, expires_in_s: float | None = None
) -> str:
    """Make a key and return it; it cannot be read again."""
    key_id = random_text(12)
    body = f"rsd_{role}_{key_id}_{secrets.token_urlsafe(32)}"
    key = f"{body}_{zlib.crc32(body.encode()):08x}"
    digest = _digest(key, pepper)
    now = clock(session)
    session.add(
        ApiKey(
            id=key_id,
            org_id=org_id,
            name=name,
            role=role,
            digest=digest,
            created_at=now,
            expires_at=None if expires_in_s is None else now + expires_in_s,
        )
    )
    session.flush()
    return key


def id_of(key: str) -> str:
    """The public part of a key that `create` made."""
    return key.split("_")[2]


def get(session: Session, key_id: str, *, org_id: str) -> ApiKey:
    """Raises `NotFound`."""
    key = session.scalar(scoped(ApiKey, org_id).where(ApiKey.id == key_id))
    if key is None:
        raise NotFound("key", key_id)
    return key


def list_page(session: Session, *, org_id: str, after: str | None, limit: int) -> Page:
    """Keys, newest first; revoked and expired ones too."""
    return paginate(
        session,
        scoped(ApiKey, org_id),
        order_by=(ApiKey.created_at, ApiKey.id),
        id_column=ApiKey.id,
        after=after,
        limit=limit,
    )


def revoke(session: Session, key_id: str, *, org_id: str) -> None:
    """Let a key open nothing any more; one that was revoked stays so.

    Raises `NotFound`, and `Conflict` for the last admin key that works: nobody could make another.
    """
    # Two that revoke the last two keys at once must not each count on the other's.
    session.execute(select(Org.id).where(Org.id == org_id).with_for_update(key_share=True))
    key = get(session, key_id, org_id=org_id)
    if key.revoked_at is not None:
        return
    now = clock(session)
    works = (ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now))
    admins = session.scalars(scoped(ApiKey, org_id).where(ApiKey.role == "admin", *works).limit(2)).all()
    if [admin.id for admin in admins] == [key_id]:
        message = f"The key '{key_id}' is the last admin key that works: make another one before."
        raise Conflict("last_admin_key", message)
    key.revoked_at = now
    session.flush()


def note_use(session: Session, key_id: str, *, every_s: float) -> None:
    """Note that a key was used, unless that is known of the last `every_s` seconds."""
    now = clock(session)
    session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, func.coalesce(ApiKey.last_used_at, 0.0) <= now - every_s)
        .values(last_used_at=now)
        .execution_options(synchronize_session=False)
    )


def authenticate(session: Session, key: str, *, pepper: str) -> Caller | None:
    """Whom `key` speaks for; None if it is malformed, unknown, expired or revoked."""
    form = _FORM.fullmatch(key)
    if form is None or f"{zlib.crc32(key[:-9].encode()):08x}" != form[4]:
        return None
    row = session.execute(
        select(ApiKey, Org.name).join(Org, Org.id == ApiKey.org_id).where(ApiKey.id == form[2])
    ).one_or_none()
    stored = row[0].digest if row else ""
    matches = hmac.compare_digest(_digest(key, pepper), stored)
    if row is None or not matches or row[0].revoked_at is not None:
        return None
    found: ApiKey = row[0]
    if found.expires_at is not None and found.expires_at <= clock(session):
        return None
    return Caller(org_id=found.org_id, org_name=row[1], key_id=found.id, role=found.role)


def _digest(key: str, pepper: str) -> str:
    if len(pepper) < _MIN_PEPPER_CHARS:
        raise ValueError(f"RESIDENCY_KEY_PEPPER must have at least {_MIN_PEPPER_CHARS} characters")
    return hmac.new(pepper.encode(), key.encode(), "sha256").hexdigest()
