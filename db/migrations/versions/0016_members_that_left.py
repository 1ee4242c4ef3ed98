"""members of a gang that left because they were told to"""

from alembic import op

revision = '0016'
down_revision = '0015'
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("gang_members") as batch:
        batch.drop_constraint(op.f("ck_gang_members_state"), type_="check")
        batch.create_check_constraint(
            op.f("ck_gang_members_state"),
            "state IN ('called', 'done', 'failed', 'leaving', 'left', 'running')",
        )


def downgrade() -> None:
    op.execute("UPDATE gang_members SET state = 'done' WHERE state = 'left'")
    with op.batch_alter_table("gang_members") as batch:
        batch.drop_constraint(op.f("ck_gang_members_state"), type_="check")
        batch.create_check_constraint(
            op.f("ck_gang_members_state"),
            "state IN ('called', 'done', 'failed', 'leaving', 'running')",
        )
