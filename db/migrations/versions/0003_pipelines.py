"""pipelines, whose stages are jobs that may wait for each other"""

import sqlalchemy as sa
from alembic import op

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None

_OLD = "'cancelled', 'failed', 'paused', 'queued', 'running', 'succeeded', 'validating_files'"
_JOB_STATES = {"old": _OLD, "new": f"{_OLD}, 'waiting'"}
_HAS_MODEL = "model_pk IS NOT NULL OR status IN ('waiting', 'failed', 'cancelled')"


def _change_states(batch, version):
    batch.drop_constraint(op.f("ck_jobs_status"), type_="check")
    batch.create_check_constraint(op.f("ck_jobs_status"), f"status IN ({_JOB_STATES[version]})")


def upgrade() -> None:
    op.create_table(
        "pipelines",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_pipelines_org_id_orgs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pipelines")),
    )
    op.create_index(op.f("ix_pipelines_org_id_created_at_id"), "pipelines", ["org_id", "created_at", "id"])
    with op.batch_alter_table("jobs") as batch:  # SQLite builds the table anew
        batch.add_column(sa.Column("pipeline_id", sa.Text(), nullable=True))
        batch.add_column(sa.Column("stage", sa.Text(), nullable=True))
        batch.add_column(sa.Column("inputs_sha256", sa.Text(), nullable=True))
        batch.alter_column("model_pk", existing_type=sa.BigInteger(), nullable=True)
        batch.create_foreign_key(op.f("fk_jobs_pipeline_id_pipelines"), "pipelines", ["pipeline_id"], ["id"])
        _change_states(batch, "new")
        batch.create_check_constraint(op.f("ck_jobs_has_model"), _HAS_MODEL)
        batch.create_check_constraint(
            op.f("ck_jobs_stage_of_pipeline"), "(pipeline_id IS NULL) = (stage IS NULL)"
        )
    op.create_index(op.f("ix_jobs_org_id_inputs_sha256"), "jobs", ["org_id", "inputs_sha256"])
    op.create_table(
        "pipeline_stages",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("pipeline_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("reused", sa.Boolean(), nullable=False),
        sa.Column("needs", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_pipeline_stages_job_id_jobs")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_pipeline_stages_org_id_orgs")),
        sa.ForeignKeyConstraint(
            ["pipeline_id"], ["pipelines.id"], name=op.f("fk_pipeline_stages_pipeline_id_pipelines")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pipeline_stages")),
        sa.UniqueConstraint("pipeline_id", "name", name=op.f("uq_pipeline_stages_pipeline_id_name")),
        sa.UniqueConstraint("pipeline_id", "position", name=op.f("uq_pipeline_stages_pipeline_id_position")),
    )


def downgrade() -> None:
    op.drop_table("pipeline_stages")
    # A job without a model cannot be told in the older schema: it never ran, and is forgotten.
    for table in ("events", "checkpoints"):
        op.execute(f"DELETE FROM {table} WHERE job_id IN (SELECT id FROM jobs WHERE model_pk IS NULL)")
    op.execute("DELETE FROM jobs WHERE model_pk IS NULL")
    op.execute("UPDATE jobs SET status = 'cancelled', finished_at = created_at WHERE status = 'waiting'")
    op.drop_index(op.f("ix_jobs_org_id_inputs_sha256"), table_name="jobs")
    with op.batch_alter_table("jobs") as batch:
        batch.drop_constraint(op.f("ck_jobs_stage_of_pipeline"), type_="check")
        batch.drop_constraint(op.f("ck_jobs_has_model"), type_="check")
        _change_states(batch, "old")
        batch.drop_constraint(op.f("fk_jobs_pipeline_id_pipelines"), type_="foreignkey")
        batch.alter_column("model_pk", existing_type=sa.BigInteger(), nullable=False)
        batch.drop_column("inputs_sha256")
        batch.drop_column("stage")
        batch.drop_column("pipeline_id")
    op.drop_index(op.f("ix_pipelines_org_id_created_at_id"), table_name="pipelines")
    op.drop_table("pipelines")
