"""Whose turn it is: the order in which the waiting tasks of several tenants are claimed.

First comes the tenant with the fewest leases of the queue; of several, the one that was served the longest
ago, so that a flood delays the others by one task even where only one runs at a time. Priority, and then age,
order the tasks of one tenant: across tenants, whoever asks for the highest would have everything.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, not_, or_, select, tuple_
from sqlalchemy.orm import Session

from db.session import timestamp
from db.tables import Org
from db.work_models import Task

RANK = (Task.priority.desc(), Task.created_at, Task.id)  # of the tasks of one tenant


@dataclass(frozen=True)
class Tenant:
    """A tenant with waiting tasks, and what its turn depends on."""

    org_id: str
    held: int  # leases
    served_at: float  # its last claim; 0 before the first
    first_at: float  # the age of its first task: the order of those that nobody has served yet

    def place(self, number: int = 0) -> tuple[int, int, float, float, str]:
        """Sorts the claim of the task at `number` of its own, as if no lease ended before.

        Each claim lifts it by one lease, to behind those that had as many all along.
        """
        return self.held + number, -self.held, self.served_at, self.first_at, self.org_id


def list_tenants(session: Session, queue: str, *, delayed: bool = False) -> list[Tenant]:
    """Those with waiting tasks, in turn: steps in indexes, however many wait.

    With `delayed` also tasks whose next attempt must not begin yet.
    """
    own = (Task.queue == queue, Task.org_id == Org.id)
    waiting = select(Task.created_at).where(*own, Task.status == "queued")
    if not delayed:
        waiting = waiting.where(Task.not_before <= timestamp(session))
    held = select(func.count()).where(*own, Task.status == "leased")
    served_at = select(func.max(Task.claimed_at)).where(*own, Task.claimed_at.is_not(None))
    rows = session.execute(
        select(
            Org.id,
            held.scalar_subquery(),
            func.coalesce(served_at.scalar_subquery(), 0.0),
            waiting.order_by(*RANK).limit(1).scalar_subquery(),
        )
    )
    tenants = [Tenant(*row) for row in rows if row[3] is not None]
    return sorted(tenants, key=Tenant.place)


def rank(task: Task) -> tuple[int, float, int]:
    """Sorts the tasks of one tenant as `RANK` does."""
    return -task.priority, task.created_at, task.id


def is_behind(task: Task) -> ColumnElement[bool]:
    """The condition that a task is claimed after this one of the same tenant."""
    return not_(or_(Task.id == task.id, is_before(task)))


def is_before(task: Task) -> ColumnElement[bool]:
    """The condition that a task is claimed before this one of the same tenant."""
    older = tuple_(Task.created_at, Task.id) < tuple_(task.created_at, task.id)
    return or_(Task.priority > task.priority, and_(Task.priority == task.priority, older))


def count_before(session: Session, own: Task) -> dict[Tenant, int]:
    """How many tasks of each tenant come before `own`, as if all fitted and no lease ended meanwhile."""
    queued = (Task.queue == own.queue, Task.status == "queued")
    tenants = list_tenants(session, own.queue, delayed=True)
    mine = next((tenant for tenant in tenants if tenant.org_id == own.org_id), None)
    if mine is None:
        return {}  # claimed a moment ago
    number = session.scalar(select(func.count()).where(*queued, Task.org_id == own.org_id, is_before(own)))
    counted = select(Task.org_id, func.count()).where(*queued).group_by(Task.org_id)
    waiting = {org_id: count for org_id, count in session.execute(counted)}
    level, *rest = mine.place(number or 0)
    before = {mine: number or 0}
    for tenant in tenants:
        if tenant != mine:
            first = [*tenant.place()[1:]] < rest  # when both hold as many
            before[tenant] = min(waiting.get(tenant.org_id, 0), max(0, level - tenant.held + first))
    return before


def list_first(session: Session, queue: str, counts: Mapping[Tenant, int]) -> list[Task]:
    """The first tasks of each tenant, so many of each, in the order in which they are claimed."""
    found = []
    for tenant, count in counts.items():
        own = (Task.queue == queue, Task.status == "queued", Task.org_id == tenant.org_id)
        tasks = session.scalars(select(Task).where(*own).order_by(*RANK).limit(count))
        found += [(tenant.place(number), task) for number, task in enumerate(tasks)]
    return [task for _, task in sorted(found, key=lambda pair: pair[0])]
