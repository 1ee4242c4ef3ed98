"""paused jobs, result files, files that expire or come from elsewhere, checkpoints that can be served"""

import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None

_JOB_STATES = {
    "old": "'cancelled', 'failed', 'queued', 'running', 'succeeded', 'validating_files'",
    "new": "'cancelled', 'failed', 'paused', 'queued', 'running', 'succeeded', 'validating_files'",
}
_MODEL_KINDS = {"old": "'base', 'merged'", "new": "'base', 'checkpoint', 'merged'"}
_ONE_MODEL_A_JOB = {"old": "job_id IS NOT NULL", "new": "job_id IS NOT NULL AND kind = 'merged'"}


def _change_check(table, name, condition):
    with op.batch_alter_table(table) as batch:  # SQLite builds the table anew
        batch.drop_constraint(op.f(name), type_="check")
        batch.create_check_constraint(op.f(name), condition)


def _change_model_index(version):
    op.drop_index("uq_models_job", table_name="models")
    where = sa.text(_ONE_MODEL_A_JOB[version])
    op.create_index(
        "uq_models_job", "models", ["job_id"], unique=True, sqlite_where=where, postgresql_where=where
    )


def upgrade() -> None:
    op.add_column("files", sa.Column("source", sa.Text(), nullable=True))
    op.add_column("files", sa.Column("expires_at", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("result_files", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("pause_requested_at", sa.Double(), nullable=True))
    _change_check("jobs", "ck_jobs_status", f"status IN ({_JOB_STATES['new']})")
    _change_check("models", "ck_models_kind", f"kind IN ({_MODEL_KINDS['new']})")
    _change_model_index("new")
    op.add_column("checkpoints", sa.Column("name", sa.Text(), nullable=True))
    # Names were made up when a list was read, and served nothing; what was listed stays listed.
    op.execute(
        "UPDATE checkpoints SET name = 'ft:' || job_id || '\\:ckpt-step-' || CAST(step AS TEXT)"
    )
    with op.batch_alter_table("checkpoints") as batch:
        batch.alter_column("name", existing_type=sa.Text(), nullable=False)
    op.create_index(op.f("ix_checkpoints_org_id_name"), "checkpoints", ["org_id", "name"])


def downgrade() -> None:
    # What the older schema cannot say becomes the nearest thing that it can.
    op.execute("DELETE FROM deployments WHERE model_pk IN (SELECT pk FROM models WHERE kind = 'checkpoint')")
    op.execute("DELETE FROM models WHERE kind = 'checkpoint'")
    op.execute("UPDATE jobs SET status = 'cancelled', finished_at = created_at WHERE status = 'paused'")
    op.drop_index(op.f("ix_checkpoints_org_id_name"), table_name="checkpoints")
    op.drop_column("checkpoints", "name")
    _change_model_index("old")
    _change_check("models", "ck_models_kind", f"kind IN ({_MODEL_KINDS['old']})")
    _change_check("jobs", "ck_jobs_status", f"status IN ({_JOB_STATES['old']})")
    op.drop_column("jobs", "pause_requested_at")
    op.drop_column("jobs", "result_files")
    op.drop_column("files", "expires_at")
    op.drop_column("files", "source")
