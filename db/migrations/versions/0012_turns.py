"""tenants take turns: when a task was last claimed, and indexes of each tenant's tasks"""

import sqlalchemy as sa
from alembic import op

revision = '0012'
down_revision = '0011'
branch_labels = None
depends_on = None

_RANK = [sa.text("priority DESC"), "created_at", "id"]
_LARGE = sa.text("status = 'queued' AND (devices_needed > 1 OR nodes_needed > 1)")
_CLAIMED = sa.text("claimed_at IS NOT NULL")


def upgrade() -> None:
    op.add_column("tasks", sa.Column("claimed_at", sa.Double(), nullable=True))
    op.execute(
        "UPDATE tasks SET claimed_at = (SELECT max(started_at) FROM attempts WHERE task_id = tasks.id)"
    )
    _order(["status", "queue", "org_id", *_RANK], ["queue", "org_id", *_RANK])
    turns = ["queue", "org_id", "claimed_at"]
    op.create_index("ix_tasks_turns", "tasks", turns, sqlite_where=_CLAIMED, postgresql_where=_CLAIMED)


def downgrade() -> None:
    op.drop_index("ix_tasks_turns", "tasks")
    _order(["status", "queue", *_RANK], ["queue", "created_at"])
    op.drop_column("tasks", "claimed_at")


def _order(all_: list, large: list) -> None:
    op.drop_index("ix_tasks_large", "tasks")
    op.drop_index("ix_tasks_order", "tasks")
    op.create_index("ix_tasks_order", "tasks", all_)
    op.create_index("ix_tasks_large", "tasks", large, sqlite_where=_LARGE, postgresql_where=_LARGE)
