"""Adapters of jobs and from the disk, merged in the order in which they were given."""

from pathlib import Path

import pytest
from sqlalchemy import update

from db import registry, sources
from db.models import Job, Model
from db.session import Database
from tests.db.world import World
from tests.trainers.importing.hostile import edit_json
from tests.trainers.test_merge import write_adapter
from trainers.folders.artifacts import digest_folder
from trainers.merge import merge_adapters
from workers import importing
from workers.settings import WorkerSettings


@pytest.fixture
def database(sqlite_database: Database) -> Database:
    return sqlite_database


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """Of a job, which knew its base by another name."""
    folder = tmp_path / "runs" / "output"
    write_adapter(folder, base=tiny_model, scale=0.1)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="org/renamed")
    return folder


@pytest.fixture
def job(world: World, tiny_model: Path, adapter: Path) -> Job:
    digest = digest_folder(tiny_model)
    world.add_model("tiny", path=str(tiny_model), digest=digest)
    world.add_model("org/renamed", path=str(tiny_model), digest=digest)
    made = world.add_job(model="org/renamed")
    world.train(world.take())
    done = world.merge(world.take("cpu"))
    world.run(update(Model).where(Model.id == done.fine_tuned_model).values(adapter_path=str(adapter)))
    return world.job(made.id)


def test_a_jobs_adapter_and_then_one_from_the_disk(
    world: World, job: Job, adapter: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "disk" / "second", base=tiny_model, scale=0.1, seed=1)
    second = tmp_path / "disk" / "second"
    monkeypatch.setenv("RESIDENCY_HOME", str(world.home))
    monkeypatch.setenv("RESIDENCY_REDIS_URL", "redis+socket:///nonexistent/residency.sock")
    settings = WorkerSettings(import_dirs=str(tmp_path / "disk"), heartbeat_s=0.2)
    given = [job.id, str(second)]
    with world.database.write() as session:
        model = registry.start_import(
            session, org_id=world.org_id, model_id="new", source=sources.join(given), base_id="tiny"
        )
    importing.run(world.database, world.take("cpu"), settings)

    with world.database.read() as session:
        found = session.get_one(Model, model.pk)
    assert (found.status, found.error, found.parent_id) == ("ready", None, "tiny")
    lineage = (found.details or {})["adapters"]
    assert [member["source"] for member in lineage] == given
    assert all(len(member["sha256"]) == 64 and member["adapter_rel_effect"] > 0.1 for member in lineage)
    merge_adapters(tiny_model, adapter_dirs=[adapter, second], out_dir=tmp_path / "by-hand")
    weights = "model.safetensors"
    assert (Path(str(found.path)) / weights).read_bytes() == (tmp_path / "by-hand" / weights).read_bytes()
