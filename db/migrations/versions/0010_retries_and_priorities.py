"""jobs that are tried again, with less memory or as new ones, and their priority"""

import sqlalchemy as sa
from alembic import op

revision = '0010'
down_revision = '0009'
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        batch.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("on_oom", sa.Text(), nullable=True))
        batch.add_column(sa.Column("retry_of", sa.Text(), nullable=True))
        batch.create_check_constraint(op.f("ck_jobs_on_oom"), "on_oom IN ('halve_batch')")
        batch.create_check_constraint(op.f("ck_jobs_priority"), "priority BETWEEN -10 AND 10")
        batch.create_foreign_key(op.f("fk_jobs_retry_of_jobs"), "jobs", ["retry_of"], ["id"])
    with op.batch_alter_table("jobs") as batch:
        batch.alter_column("priority", server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        batch.drop_constraint(op.f("fk_jobs_retry_of_jobs"), type_="foreignkey")
        batch.drop_constraint(op.f("ck_jobs_priority"), type_="check")
        batch.drop_constraint(op.f("ck_jobs_on_oom"), type_="check")
        batch.drop_column("retry_of")
        batch.drop_column("on_oom")
        batch.drop_column("priority")
