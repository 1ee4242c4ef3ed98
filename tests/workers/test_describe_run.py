"""What an attempt is given: everything that the service knows and the trainer cannot find out."""

import pytest

from db import files, jobs, tasks
from tests.db.world import World, claim
from trainers import specs
from workers.train import describe_run


def add_checked_file(world: World, format_: str | None) -> str:
    file = world.upload()
    with world.database.write() as session:
        tasks.close_waiting(session, kind="validate", subject_id=file.id)
        report = {"rows": 3, "kind": "document"} | ({"format": format_} if format_ else {})
        files.record_check(session, file.id, report=report, error=None)
    return file.id


@pytest.mark.parametrize(
    ("train", "validation"), [("plain_text", "text"), ("text", "plain_text"), (None, None)]
)
def test_the_formats_that_the_checks_found(world: World, train: str | None, validation: str | None):
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

    assert (spec.train_format, spec.validation_format) == (train, validation)


def test_without_a_validation_file_there_is_no_format_of_one(world: World):
    world.add_job(add_checked_file(world, "messages"))
    method = specs.parse_method(None, None)
    with world.database.write() as session:
        lease = claim(session)
        assert lease is not None
        jobs.start(session, lease, resolved=specs.resolve(method, n_examples=3, seed=7))
        spec = describe_run(session, lease)

    assert (spec.train_format, spec.validation_file, spec.validation_format) == ("messages", None, None)
