"""the machines that workers run on, and attempts on several of them"""

import sqlalchemy as sa
from alembic import op

revision = '0009'
down_revision = '0008'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "nodes",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("devices", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("free_bytes", sa.BigInteger(), nullable=False),
        sa.Column("registered_at", sa.Double(), nullable=False),
        sa.Column("last_seen_at", sa.Double(), nullable=False),
        sa.CheckConstraint("state IN ('active', 'draining')", name=op.f("ck_nodes_state")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_nodes")),
    )
    with op.batch_alter_table("tasks") as batch:
        batch.add_column(sa.Column("nodes_needed", sa.Integer(), nullable=False, server_default="1"))
    with op.batch_alter_table("tasks") as batch:
        batch.alter_column("nodes_needed", server_default=None)
    op.create_table(
        "gang_members",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("attempt_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("rendezvous", sa.Text(), nullable=True),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.CheckConstraint(
            "state IN ('called', 'done', 'failed', 'leaving', 'running')", name=op.f("ck_gang_members_state")
        ),
        sa.ForeignKeyConstraint(
            ["attempt_id"], ["attempts.id"], name=op.f("fk_gang_members_attempt_id_attempts")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_gang_members")),
        sa.UniqueConstraint("attempt_id", "node", name=op.f("uq_gang_members_attempt_id_node")),
        sa.UniqueConstraint("attempt_id", "rank", name=op.f("uq_gang_members_attempt_id_rank")),
    )
    op.create_index(op.f("ix_gang_members_node_state"), "gang_members", ["node", "state"])
    op.create_table(
        "quarantines",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("attempt_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("released_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["attempt_id"], ["attempts.id"], name=op.f("fk_quarantines_attempt_id_attempts")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_quarantines")),
    )
    live = sa.text("released_at IS NULL")
    op.create_index(
        "uq_quarantines_live",
        "quarantines",
        ["node", "device"],
        unique=True,
        sqlite_where=live,
        postgresql_where=live,
    )


def downgrade() -> None:
    op.drop_table("quarantines")
    op.drop_table("gang_members")
    with op.batch_alter_table("tasks") as batch:
        batch.drop_column("nodes_needed")
    op.drop_table("nodes")
