"""Cursor pagination: the cursor is an id, exclusive, and the order is total even under equal times."""

from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, and_, or_
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.errors import Conflict


class Page(NamedTuple):
    """Rows of one page and whether more follow."""

    rows: list[Any]
    has_more: bool


def paginate(
    session: Session,
    select: Select[Any],
    *,
    order_by: tuple[InstrumentedAttribute[Any], ...],
    id_column: InstrumentedAttribute[str],
    after: str | None,
    limit: int,
    descending: bool = True,
    only: ColumnElement[bool] | None = None,
) -> Page:
    """At most `limit` rows of `select` that follow the row with id `after`.

    `only` narrows the page but not the cursor, whose row may have changed since. `order_by` must end in a
    unique column. Raises `Conflict` with code `invalid_value` for an unknown cursor.
    """
    if after is not None:
        cursor = session.execute(select.with_only_columns(*order_by).where(id_column == after)).one_or_none()
        if cursor is None:
            raise Conflict("invalid_value", f"No object with id '{after}' in this list.", param="after")
        select = select.where(_beyond(order_by, tuple(cursor), descending=descending))
    if only is not None:
        select = select.where(only)
    ordering = [column.desc() if descending else column.asc() for column in order_by]
    rows = list(session.scalars(select.order_by(*ordering).limit(limit + 1)))
    return Page(rows[:limit], len(rows) > limit)


def _beyond(
    columns: tuple[InstrumentedAttribute[Any], ...], values: tuple[Any, ...], *, descending: bool
) -> Any:
    # (a, b) < (x, y) written out, since not every database compares rows
    clauses = []
    for index, column in enumerate(columns):
        equal = [columns[i] == values[i] for i in range(index)]
        clauses.append(and_(*equal, column < values[index] if descending else column > values[index]))
    return or_(*clauses)
