"""What an attempt is given: everything that the service knows and the trainer cannot find out."""

import pytest
from sqlalchemy import update

from db import files, jobs, tasks
from db.models import Job, Model
from tests.db.world import World, claim
from trainers import specs
from workers.layouts import layout_of
from workers.ring import _start_job
from workers.train import describe_run


def add_checked_file(world: World, filename: str) -> str:
    file = world.upload(filename=filename)
    with world.database.write() as session:
        tasks.close_waiting(session, kind="validate", subject_id=file.id)
        files.record_check(session, file.id, report={"rows": 3, "kind": "document"}, error=None)
    return file.id


@pytest.mark.parametrize(
    ("train", "validation", "containers"),
    [
        ("a.txt", "b.csv.gz", ("txt", "csv")),
        ("a.parquet", "b.txt", ("parquet", "txt")),
        ("of an older version", "b.jsonl", ("jsonl", "jsonl")),
    ],
)
def test_the_names_of_the_files_tell_how_they_are_read(
    world: World, train: str, validation: str, containers: tuple[str, str]
):
    world.add_job(
        add_checked_file(world, train),
        validation_file=add_checked_file(world, validation),
        method="pretraining",
    )
    method = specs.parse_method({"type": "pretraining"}, None)
    with world.database.write() as session:
        lease = claim(session)
        assert lease is not None
        jobs.start(session, lease, resolved=specs.resolve(method, n_examples=3, seed=7))
        spec = describe_run(session, lease)

    assert (spec.train_layout.container, spec.validation_layout.container) == containers
    assert [layout.gzip for layout in (spec.train_layout, spec.validation_layout)] == [
        name.endswith(".gz") for name in (train, validation)
    ]
    assert spec.validation_file is not None
    assert (spec.train_sha256, spec.validation_sha256) == (spec.train_file.name, spec.validation_file.name)
    assert len(spec.train_sha256) == 64


def test_what_the_owner_says_of_the_rows_goes_along(world: World):
    columns = {"question": "Frage"}
    said = {"format": "question", "column_map": columns, "max_invalid_fraction": 0.25}
    layout = layout_of(world.upload(filename="a.csv", **said))
    assert layout.container == "csv"
    assert {name: getattr(layout, name) for name in said} == said


def test_without_a_validation_file_there_is_none(world: World):
    world.add_job(add_checked_file(world, "a.jsonl"))
    method = specs.parse_method(None, None)
    with world.database.write() as session:
        lease = claim(session)
        assert lease is not None
        jobs.start(session, lease, resolved=specs.resolve(method, n_examples=3, seed=7))
        spec = describe_run(session, lease)

    assert spec.validation_file is None


def test_several_files_come_with_their_shares_and_decide_the_number_of_steps(world: World):
    files_ = [add_checked_file(world, "a.jsonl"), add_checked_file(world, "b.csv")]
    method = specs.parse_method({"type": "supervised"}, None)
    mixed = [{"file": file, "epochs": epochs} for file, epochs in zip(files_, (100.0, 2.0), strict=True)]
    world.add_job(files_[0], spec={"method": method.to_request(), "training_files": mixed})
    with world.database.write() as session:
        lease = claim(session)
        assert lease is not None
        assert _start_job(session, lease)
        spec = describe_run(session, lease)

    read = [(part.epochs, part.layout.container) for part in spec.mixture]
    assert read == [(100.0, "jsonl"), (2.0, "csv")]
    assert spec.train_file == spec.mixture[0].path
    assert spec.settings().n_epochs == 3  # of 306 rows; three rows would be shown 25 times


def test_the_adapter_that_a_job_starts_from(world: World):
    shape = {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": None}
    earlier = world.add_job()
    world.train(world.take())
    world.run(update(Job).where(Job.id == earlier.id).values(resolved=shape))
    world.merge(world.take("cpu"))
    asked = specs.parse_method(
        {"type": "supervised", "supervised": {"hyperparameters": {"init_adapter": earlier.id}}}, None
    )
    job = world.add_job(spec={"method": asked.to_request()})
    # What the adapter decides is part of the method by now.
    method = specs.parse_method(job.spec["method"], None)
    with world.database.write() as session:
        lease = claim(session)
        assert lease is not None
        jobs.start(session, lease, resolved=specs.resolve(method, n_examples=3, seed=7))
        spec = describe_run(session, lease)

    assert (spec.init_adapter_dir, spec.init_adapter_digest) == (world.home / "adapter", "e" * 64)
    assert spec.init_manifest_sha256 is None
    with world.database.write() as session:
        session.execute(
            update(Model).where(Model.adapter_path == str(world.home / "adapter")).values(kind="checkpoint")
        )
        assert describe_run(session, lease).init_manifest_sha256 == "e" * 64
    settings = spec.settings()
    assert (settings.lora_rank, settings.lora_alpha, settings.target_modules) == (4, 8, ["q_proj"])
