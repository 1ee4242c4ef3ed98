"""Jobs as lists and queues show them; nothing here changes one."""

from sqlalchemy import ColumnElement, and_, exists, func, or_, select
from sqlalchemy.orm import Session

from db.models import Job, Task
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


def queue_position(session: Session, job_id: str) -> int | None:
    """How many waiting jobs, of all tenants, come before this one; None unless it waits for a device."""
    own = session.scalar(
        select(Task).where(Task.kind == "train", Task.subject_id == job_id, Task.status == "queued")
    )
    if own is None:
        return None
    same = Task.priority == own.priority
    earlier = or_(
        Task.priority > own.priority,
        and_(same, Task.created_at < own.created_at),
        and_(same, Task.created_at == own.created_at, Task.id < own.id),
    )
    waiting = select(func.count()).where(Task.queue == own.queue, Task.status == "queued", earlier)
    return session.scalar(waiting)


def _has_pair(session: Session, key: str, value: str) -> ColumnElement[bool]:
    # Not by path: a key may hold what paths are made of.
    postgres = session.get_bind().dialect.name == "postgresql"
    each = func.json_each_text if postgres else func.json_each
    pairs = each(Job.metadata_).table_valued("key", "value")
    return exists().where(pairs.c.key == key, pairs.c.value == value)
