"""Bring a database to the newest schema, one process at a time."""

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import text

from db import models, work_models  # noqa: F401 (their tables enter the metadata)
from db.session import Database
from db.tables import Base

_MIGRATIONS_DIR = Path(__file__).parent / "migrations"
_ADVISORY_LOCK = 0x5265736964656E63  # the bytes of "Residenc"


def upgrade(database: Database) -> None:
    """Run the pending migrations in one transaction under a lock; the second caller finds nothing to do."""
    run(database, command.upgrade, "head")


def run(database: Database, action: Callable[[Config, str], None], revision: str) -> None:
    """Carry out an Alembic command, `upgrade` or `downgrade`, in one transaction under a lock."""
    with database.migrate() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        config = alembic_config()
        config.attributes["connection"] = connection
        action(config, revision)


def alembic_config() -> Config:
    """Alembic's configuration, without a file."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS_DIR))
    config.attributes["metadata"] = Base.metadata
    return config
