"""Jobs as lists show them; nothing here changes one."""

from sqlalchemy import ColumnElement, and_, exists, func
from sqlalchemy.orm import Session

from db.models import Job
from db.pages import Page, paginate
from db.scope import scoped


def list_page(
    session: Session,
    *,
    org_id: str,
    after: str | None,
    limit: int,
    status: str | None = None,
    method: str | None = None,
    metadata: dict[str, str] | None = None,
    without_metadata: bool = False,
) -> Page:
    """Jobs of a tenant, newest first; with `metadata` those that carry all of its pairs."""
    wanted = [_has_pair(session, key, value) for key, value in (metadata or {}).items()]
    if without_metadata:
        wanted.append(Job.metadata_.is_(None))
    if status is not None:
        wanted.append(Job.status == status)
    if method is not None:
        wanted.append(Job.method == method)
    return paginate(
        session,
        scoped(Job, org_id),
        order_by=(Job.created_at, Job.id),
        id_column=Job.id,
        after=after,
        limit=limit,
        only=and_(*wanted) if wanted else None,
    )


def _has_pair(session: Session, key: str, value: str) -> ColumnElement[bool]:
    # Not by path: a key may hold what paths are made of.
    postgres = session.get_bind().dialect.name == "postgresql"
    each = func.json_each_text if postgres else func.json_each
    pairs = each(Job.metadata_).table_valued("key", "value")
    return exists().where(pairs.c.key == key, pairs.c.value == value)
