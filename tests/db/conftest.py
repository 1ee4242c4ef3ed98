"""Fixtures of the database suite."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text

from db.migrate import upgrade
from db.pipelines import NewStage
from db.session import Database
from tests.db.world import World


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


@pytest.fixture
def stage(world: World) -> Callable[..., NewStage]:
    """Makes stages that train on one checked file."""
    file_id = world.add_file()

    def make(name: str, /, *, file: str = file_id, method: str = "supervised", **more: Any) -> NewStage:
        needs = {field: more.pop(field) for field in ("model_from", "reward_model") if field in more}
        hyperparameters = {"reward_model": "?"} if "reward_model" in needs else {}
        spec = {"method": {"type": method, method: {"hyperparameters": hyperparameters}}}
        new = world.new_job(file, method=method, **({"spec": spec} | more))
        return NewStage(name, new, {field.removesuffix("_from"): name for field, name in needs.items()})

    return make


@pytest.fixture
def four(stage: Callable[..., NewStage]) -> list[NewStage]:
    """Pretraining, fine-tuning, a reward model beside it, and reinforcement learning on both."""
    return [
        stage("pt", method="pretraining"),
        stage("sft", model_from="pt"),
        stage("rm", model_from="sft", method="reward"),
        stage("rl", model_from="sft", reward_model="rm", method="ppo"),
    ]
