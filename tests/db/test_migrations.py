"""The migrations make exactly the schema of the models, and unmake it (G35)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from db import pipelines, previews
from db.errors import NotFound
from db.migrate import alembic_config, upgrade
from db.migrate import run as migrate
from db.pipelines import NewStage
from db.session import Database
from db.tables import Base
from tests.db.world import World, run_against_paused

PROCESSES = 4
UPGRADE = """
import sys
from db.migrate import upgrade
from db.session import Database
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
upgrade(Database(sys.argv[1]))
"""


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def describe(database: Database) -> dict[str, Any]:
    """Everything that a database can tell of its tables, CHECKs and the conditions of indexes included."""
    inspector = inspect(database.engine)

    def ordered(rows: list[Any]) -> list[str]:
        # `str`, since the condition of an index is an object without equality
        return sorted(
            str({key: str(row[key]) for key in sorted(row) if key != "dialect_options"})
            + str({key: str(value) for key, value in row.get("dialect_options", {}).items()})
            for row in rows
        )

    return {
        table: {
            "columns": sorted(
                (column["name"], str(column["type"]), column["nullable"], column["default"])
                for column in inspector.get_columns(table)
            ),
            "key": inspector.get_pk_constraint(table),
            "checks": ordered(inspector.get_check_constraints(table)),
            "unique": ordered(inspector.get_unique_constraints(table)),
            "foreign": ordered(inspector.get_foreign_keys(table)),
            "indexes": ordered(inspector.get_indexes(table)),
        }
        for table in tables(database)
    }


def test_the_migrations_have_one_head():
    assert len(ScriptDirectory.from_config(alembic_config()).get_heads()) == 1


def test_an_empty_database_gets_every_table(database: Database):
    assert tables(database) == {table.name for table in Base.metadata.sorted_tables}
    with database.read() as session:
        version = session.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    assert version == ScriptDirectory.from_config(alembic_config()).get_current_head()


def test_autogenerate_finds_nothing_to_do(database: Database):
    sqlite = database.engine.dialect.name == "sqlite"

    def is_comparable(_item: Any, name: str | None, *_: Any) -> bool:
        # SQLite does not tell that a column is DESC.
        return not (sqlite and name in ("ix_tasks_order", "ix_tasks_large"))

    with database.read() as session:
        context = MigrationContext.configure(
            session.connection(),
            opts={"compare_type": True, "compare_server_default": True, "include_object": is_comparable},
        )
        assert compare_metadata(context, Base.metadata) == []


def test_migrated_and_created_schemas_are_equal(database: Database):
    """Autogenerate does not look at CHECKs nor at the conditions of partial indexes."""
    migrated = describe(database)
    assert any(of_table["checks"] for of_table in migrated.values())
    migrate(database, command.downgrade, "base")
    with database.write() as session:
        Base.metadata.create_all(session.connection())

    assert describe(database) == migrated


def test_every_step_down_and_up_again(database: Database):
    migrated = describe(database)
    revisions = [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()]

    for _ in revisions:
        migrate(database, command.downgrade, "-1")
    assert tables(database) == set()
    for _ in revisions:
        migrate(database, command.upgrade, "+1")

    assert describe(database) == migrated


def test_a_second_upgrade_changes_nothing(database: Database):
    before = describe(database)

    upgrade(database)

    assert describe(database) == before


@pytest.fixture
def empty_url(database: Database, tmp_path: Path) -> str:
    """A database in which nobody has done anything yet."""
    if database.engine.dialect.name == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    migrate(database, command.downgrade, "base")
    with database.write() as session:
        session.execute(text("DROP TABLE alembic_version"))
    return database.url


def test_an_upgrade_waits_for_one_that_is_not_committed(empty_url: str):
    database = Database(empty_url)

    outcomes = run_against_paused(database, upgrade, lambda: upgrade(database))

    assert outcomes == (None, None)
    assert tables(database) == {table.name for table in Base.metadata.sorted_tables}
    database.dispose()


@pytest.mark.long
def test_processes_that_start_together_migrate_once(empty_url: str):
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", UPGRADE, empty_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    for starter in starters:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"

    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write("go\n")
        starter.stdin.flush()
    errors = [starter.communicate()[1] for starter in starters]

    assert [starter.returncode for starter in starters] == [0] * PROCESSES, errors
    database = Database(empty_url)
    assert tables(database) == {table.name for table in Base.metadata.sorted_tables}
    database.dispose()


def test_previews_are_forgotten_by_the_schema_before_them(world: World):
    model = world.add_model("m")
    file = world.upload()
    with world.database.write() as session:
        preview = previews.ask(session, "a" * 64, kind="rows", file=file, model=model, asked={})
    lease = world.take("cpu")
    assert lease.subject_id == preview.id

    migrate(world.database, command.downgrade, "0003")
    with world.database.read() as session:
        assert session.execute(text("SELECT kind FROM tasks")).scalars().all() == ["validate"]

    upgrade(world.database)


def test_pipelines_are_forgotten_by_the_schema_before_them(world: World):
    file_id = world.add_file()
    base = NewStage("a", world.new_job(file_id), {})
    tuned = NewStage("b", world.new_job(file_id, seed=8), {"model": "a"})
    with world.database.write() as session:
        pipeline = pipelines.create(session, [base, tuned], name="p", org_id=world.org_id)
        first, second = pipelines.stages_of(session, [pipeline], org_id=world.org_id)[pipeline.id]

    migrate(world.database, command.downgrade, "0002")
    with world.database.read() as session:
        rows = session.execute(text("SELECT id, status FROM jobs")).all()
        told = session.execute(text("SELECT DISTINCT job_id FROM events")).scalars().all()
    assert [tuple(row) for row in rows] == [(first.job.id, "queued")]
    assert told == [first.job.id]

    upgrade(world.database)
    assert world.job(first.job.id).pipeline_id is None
    with pytest.raises(NotFound):
        world.job(second.job.id)
