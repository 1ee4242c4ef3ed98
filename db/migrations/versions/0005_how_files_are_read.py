"""what the owner of a file says of its rows"""

import sqlalchemy as sa
from alembic import op

revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("files", sa.Column("format", sa.Text(), nullable=True))
    op.add_column("files", sa.Column("column_map", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("files", sa.Column("max_invalid_fraction", sa.Double(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("files") as batch:
        batch.drop_column("max_invalid_fraction")
        batch.drop_column("column_map")
        batch.drop_column("format")
