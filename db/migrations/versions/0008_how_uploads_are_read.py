"""what the owner of a file that comes in parts says of its rows"""

import sqlalchemy as sa
from alembic import op

revision = '0008'
down_revision = '0007'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("uploads", sa.Column("format", sa.Text(), nullable=True))
    op.add_column("uploads", sa.Column("column_map", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("uploads", sa.Column("max_invalid_fraction", sa.Double(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("uploads") as batch:
        batch.drop_column("max_invalid_fraction")
        batch.drop_column("column_map")
        batch.drop_column("format")
