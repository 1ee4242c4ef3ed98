"""Bearer keys: `rsd_<role>_<id>_<43 random>_<crc>`. Stored as an HMAC, compared in constant time."""

import hmac
import re
import secrets
import zlib
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.ids import random_text
from db.models import ApiKey
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


def create(session: Session, *, org_id: str, name: str, role: str, pepper: str) -> str:
    """Make a key and return it; it cannot be read again."""
    key_id = random_text(12)
    body = f"rsd_{role}_{key_id}_{secrets.token_urlsafe(32)}"
    key = f"{body}_{zlib.crc32(body.encode()):08x}"
    digest = _digest(key, pepper)
    session.add(
        ApiKey(id=key_id, org_id=org_id, name=name, role=role, digest=digest, created_at=clock(session))
    )
    session.flush()
    return key


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
