"""when a node's training worker last spoke, apart from its other workers"""

import sqlalchemy as sa
from alembic import op

revision = '0013'
down_revision = '0012'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("trains_at", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("nodes", "trains_at")
