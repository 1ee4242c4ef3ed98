"""Fixtures of the database suite."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text

from db.migrate import upgrade
from db.session import Database


@pytest.fixture(scope="session", autouse=True)
def _hasty_postgres(postgres_url: str) -> None:
    """No test here pulls the plug, so nobody needs to wait for the disk."""
    url = postgres_url.replace("postgresql:", "postgresql+psycopg:")
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("ALTER SYSTEM SET fsync = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    admin.dispose()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    def hurry(connection: sqlite3.Connection, _: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    event.listen(database.engine, "connect", hurry)
    upgrade(database)
    yield database
    database.dispose()
