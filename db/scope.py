"""The one place where rows are narrowed to a tenant."""

from typing import TypeVar

from sqlalchemy import Select, or_, select

from db.models import Model
from db.tables import Owned

Row = TypeVar("Row", bound=Owned)


def scoped(entity: type[Row], org_id: str) -> Select[Row]:
    """SELECT of the rows of `entity` that `org_id` may see: its own, and models that are public."""
    if issubclass(entity, Model):
        return select(entity).where(or_(entity.org_id == org_id, entity.public), entity.deleted_at.is_(None))
    return select(entity).where(entity.org_id == org_id)


def owns(row: Owned, org_id: str) -> bool:
    """Whether `row` is the tenant's own; what is public may be seen by all and changed by its owner."""
    return row.org_id == org_id
