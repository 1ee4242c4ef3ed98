"""Two kinds of transaction: writers take turns, readers keep nothing."""

import sqlite3

import pytest
from sqlalchemy import select

from db.session import Database
from db.tables import Org

ORG = {"id": "org-1", "name": "one", "created_at": 1.0}


def names(database: Database) -> list[str]:
    with database.read() as session:
        return list(session.scalars(select(Org.name)))


def test_a_write_is_kept_whole_or_not_at_all(database: Database):
    def write_and_break() -> None:
        with database.write() as session:
            session.add(Org(**ORG))
            session.flush()
            raise RuntimeError("broken in the middle")

    with pytest.raises(RuntimeError):
        write_and_break()
    assert names(database) == []
    with database.write() as session:
        session.add(Org(**ORG))
    assert names(database) == ["one"]


def test_a_reader_keeps_nothing(database: Database):
    with database.read() as session:
        session.add(Org(**ORG))
        session.flush()

    assert names(database) == []


def test_a_writer_has_its_turn_before_its_first_statement(sqlite_database: Database):
    """Else it would read the clock, then wait for its turn, and act on an old time."""
    other = sqlite3.connect(str(sqlite_database.engine.url.database), timeout=0)

    with sqlite_database.write(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.close()
