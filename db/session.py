"""One database, two kinds of transaction: `read` and `write`."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from sqlalchemy import (
    Connection,
    CursorResult,
    Double,
    Engine,
    Update,
    create_engine,
    event,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

_BUSY_TIMEOUT_S = 10
_POSTGRES: dict[str, str | int] = {
    "options": "-c statement_timeout=15000 -c idle_in_transaction_session_timeout=30000",
    # A server that falls silent is an error after 20 s; left alone, Linux waits a quarter of an hour.
    "connect_timeout": 20,
    "tcp_user_timeout": 20_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
}


class Database:
    """An engine on SQLite (WAL) or PostgreSQL. Sessions are short: read, close, work, open a new one."""

    def __init__(self, url: str) -> None:
        self.url = _with_driver(url)
        self.engine = _make_engine(self.url)
        self._writer = self.engine.execution_options(residency_write=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading; nothing it changes is kept."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session whose changes are committed when the block ends, or rolled back on any error."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            session.connection()  # SQLite: wait for the lock here, before the caller reads the clock
            yield session

    @contextmanager
    def migrate(self) -> Iterator[Connection]:
        """A write transaction in which SQLite checks references only at its end: it rebuilds whole tables."""
        with self._writer.connect() as connection:
            sqlite = connection.dialect.name == "sqlite"
            raw = connection.connection.driver_connection
            assert raw is not None  # noqa: S101 (the connection is open)
            if sqlite:  # which ignores the switch inside a transaction
                raw.execute("PRAGMA foreign_keys=OFF")
            try:
                with connection.begin():
                    yield connection
                    if sqlite and connection.exec_driver_sql("PRAGMA foreign_key_check").first():
                        raise RuntimeError("a migration left references to rows that are gone")
            finally:
                if sqlite:
                    raw.execute("PRAGMA foreign_keys=ON")

    def dispose(self, *, close: bool = True) -> None:
        """Drop pooled connections. After a fork use `close=False`: they belong to the parent."""
        self.engine.dispose(close=close)


def clock(session: Session) -> float:
    """Unix seconds by the database's clock: leases of several hosts must be compared on one clock."""
    if session.get_bind().dialect.name == "postgresql":
        return float(session.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
    return time.time()


def timestamp(session: Session) -> Any:
    """The same as a value of a statement, read when that is carried out: it costs no statement of its own.

    To SQLAlchemy an expression or a number: add to it, store it, compare with it; nothing else.
    """
    if session.get_bind().dialect.name == "postgresql":
        return literal_column("extract(epoch FROM clock_timestamp())::double precision", Double())
    return time.time()


def changed_one(session: Session, statement: Update) -> bool:
    """Carry out an update and say whether it met exactly one row: the swap of a compare-and-swap."""
    result = session.execute(statement.execution_options(synchronize_session=False))
    return cast(CursorResult[Any], result).rowcount == 1


def lock_digest(session: Session, sha256: str) -> None:
    """Exclude others that lock the same digest until the commit. SQLite has one writer at a time anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(int(sha256[:15], 16))))


def _with_driver(url: str) -> str:
    parsed = make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed.render_as_string(hide_password=False)


def _make_engine(url: str) -> Engine:
    if url.startswith("sqlite"):
        engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    return create_engine(url, pool_pre_ping=True, connect_args=_POSTGRES)


def _configure_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # The driver's own transaction handling is switched off, so that `_begin_sqlite` decides.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_S * 1000}")
    _enter_wal(connection)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _enter_wal(connection: sqlite3.Connection) -> None:
    # The change of a new file to WAL takes a lock that SQLite does not wait for, whatever the timeout.
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that reads and then writes fails at once when another one wrote in between,
    # whatever the busy timeout; so writers take the lock before they read.
    write = connection.get_execution_options().get("residency_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
