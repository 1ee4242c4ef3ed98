"""what models and methods see in files"""

import sqlalchemy as sa
from alembic import op

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None

_OLD = "'import', 'merge', 'train', 'validate'"
_NEW = "'import', 'merge', 'preview', 'train', 'validate'"


def _change_kinds(kinds):
    with op.batch_alter_table("tasks") as batch:  # SQLite builds the table anew
        batch.drop_constraint(op.f("ck_tasks_kind"), type_="check")
        batch.create_check_constraint(op.f("ck_tasks_kind"), f"kind IN ({kinds})")


def upgrade() -> None:
    _change_kinds(_NEW)
    op.create_table(
        "previews",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("request", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("answer", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.CheckConstraint("kind IN ('rows', 'tokens')", name=op.f("ck_previews_kind")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_previews_org_id_orgs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_previews")),
        sa.UniqueConstraint("org_id", "key", name=op.f("uq_previews_org_id_key")),
    )
    op.create_index(op.f("ix_previews_org_id_sha256"), "previews", ["org_id", "sha256"])
    op.create_index(op.f("ix_previews_expires_at"), "previews", ["expires_at"])


def downgrade() -> None:
    op.drop_table("previews")
    # An answer that nobody can fetch any more: the work towards it is forgotten.
    of_previews = "IN (SELECT id FROM tasks WHERE kind = 'preview')"
    op.execute(
        f"DELETE FROM device_leases WHERE attempt_id IN (SELECT id FROM attempts WHERE task_id {of_previews})"
    )
    op.execute(f"DELETE FROM attempts WHERE task_id {of_previews}")
    op.execute("DELETE FROM tasks WHERE kind = 'preview'")
    _change_kinds(_OLD)
