"""Fixtures that all suites share: both databases, a tiny model, and the whole service."""

import os

# Before torch is imported: the tests share a small machine and must give the same sums on every run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pgserver
import pytest
from filelock import FileLock
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import make_url

from db import keys
from db.migrate import upgrade
from db.session import Database
from tests.db.world import World
from tests.faults import parts
from tests.stack import Stack, processes_of, start_stack
from tests.tiny import build_model, chat_rows


def pytest_report_header() -> str:
    """What replays the choices of this run."""
    return f"FAULTS_SEED={parts.SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the state machines, the longest of `make faults`: one process would end with all of them.

    Then files with a service of their own: it has ended when the one that others share begins.
    """
    items.sort(key=lambda item: (not item.path.stem.endswith("_machine"), not _has_own_stack(item)))


def _has_own_stack(item: pytest.Item) -> bool:
    assert isinstance(item, pytest.Function)
    stacks = item._fixtureinfo.name2fixturedefs.get("stack", ())
    return any(stack.scope == "module" for stack in stacks[-1:])


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real PostgreSQL 16 on a socket of its own.

    Not below pytest's folder: root's PostgreSQL runs as another user, and each pytest that starts closes that
    folder to others, under the servers of those that run.
    """
    with tempfile.TemporaryDirectory(prefix="residency-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        server.psql("ALTER SYSTEM SET fsync = off;\nSELECT pg_reload_conf();")  # nobody pulls the plug here
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the newest schema; a copy is ready sooner than another migration."""
    path = tmp_path_factory.mktemp("migrated") / "empty.db"
    database = Database(f"sqlite:///{path}")
    upgrade(database)
    database.dispose()
    return path


@pytest.fixture
def sqlite_database(tmp_path: Path, migrated_file: Path) -> Iterator[Database]:
    """Nobody pulls the plug of a test's own database, so nobody waits for the disk."""

    def hurry(connection: sqlite3.Connection, _: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    database = Database(f"sqlite:///{shutil.copy(migrated_file, tmp_path / 'test.db')}")
    event.listen(database.engine, "connect", hurry)
    yield database
    database.dispose()


@contextmanager
def _postgres_database(postgres_url: str, template: str) -> Iterator[str]:
    """The URL of a new database that begins as a copy of `template`."""
    name = f"test_{uuid.uuid4().hex}"
    admin = create_engine(
        postgres_url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
    )
    with admin.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY'))
    yield postgres_url.replace("/postgres?", f"/{name}?")
    with admin.connect() as connection:
        connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    admin.dispose()


@pytest.fixture
def empty_postgres_url(postgres_url: str) -> Iterator[str]:
    """A database that holds nothing of ours."""
    with _postgres_database(postgres_url, "template1") as url:
        yield url


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[str]:
    """The name of a PostgreSQL database with the newest schema and no rows, to be copied."""
    with _postgres_database(postgres_url, "template1") as url:
        database = Database(url)
        upgrade(database)
        database.dispose()
        yield make_url(url).database or ""


@pytest.fixture
def postgres_database(postgres_url: str, migrated_postgres: str) -> Iterator[Database]:
    with _postgres_database(postgres_url, migrated_postgres) as url:
        database = Database(url)
        yield database
        database.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> Database:
    """Every test of the database layer runs on both."""
    return request.getfixturevalue(f"{request.param}_database")


@pytest.fixture
def world(database: Database, tmp_path: Path) -> World:
    """An organisation with one ready base model, on each of the two databases."""
    with database.write() as session:
        keys.ensure_default_org(session)
    world = World(database, tmp_path)
    world.add_model()
    return world


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A Hugging Face folder with a random llama: 2 layers, hidden size 64, about 150 k parameters.

    The processes of one run of the tests share it: making it takes torch, which few of them need otherwise.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "models" / "tiny"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            build_model(folder)
    return folder


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 chat rows as JSONL."""
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(64)))
    return path


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """`residency up` with the tiny model imported, shared by all tests that do not kill parts of it."""
    home = tmp_path_factory.mktemp("stack") / "home"
    stack = start_stack(home, import_dirs=[tiny_model])
    stack.import_model(tiny_model, model_id="tiny")
    yield stack
    assert stack.stop() == 0
    assert processes_of(home) == []
