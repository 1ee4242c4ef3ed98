"""an index in the order in which tasks are claimed, and one of those that others may pass"""

import sqlalchemy as sa
from alembic import op

revision = '0011'
down_revision = '0010'
branch_labels = None
depends_on = None

_OLD = "ix_tasks_status_queue_priority_created_at"
_LARGE = sa.text("status = 'queued' AND (devices_needed > 1 OR nodes_needed > 1)")


def upgrade() -> None:
    op.drop_index(_OLD, "tasks")
    order = ["status", "queue", sa.text("priority DESC"), "created_at", "id"]
    op.create_index("ix_tasks_order", "tasks", order)
    op.create_index(
        "ix_tasks_large", "tasks", ["queue", "created_at"], sqlite_where=_LARGE, postgresql_where=_LARGE
    )


def downgrade() -> None:
    op.drop_index("ix_tasks_large", "tasks")
    op.drop_index("ix_tasks_order", "tasks")
    op.create_index(_OLD, "tasks", ["status", "queue", "priority", "created_at"])
