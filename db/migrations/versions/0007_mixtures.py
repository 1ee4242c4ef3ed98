"""files of jobs that train on several"""

import sqlalchemy as sa
from alembic import op

revision = '0007'
down_revision = '0006'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "mixed_files",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("file_id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_mixed_files_job_id_jobs")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_mixed_files_org_id_orgs")),
        sa.PrimaryKeyConstraint("job_id", "file_id", name=op.f("pk_mixed_files")),
    )
    op.create_index(op.f("ix_mixed_files_file_id"), "mixed_files", ["file_id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_mixed_files_file_id"), table_name="mixed_files")
    op.drop_table("mixed_files")
