"""A file must hold the rows that the job's method learns from."""

import pytest

from db.errors import Conflict
from tests.db.world import World

FROM_CONVERSATIONS = {"method": {"type": "supervised"}, "learns_from": ["conversation"]}


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_checked_file_that_does_not_fit_is_refused(world: World, param: str):
    files = {"training_file": world.add_file(kind="conversation")}
    files |= {param: world.add_file(kind="preference")}

    with pytest.raises(Conflict) as refused:
        world.add_job(**files, spec=FROM_CONVERSATIONS)

    assert (refused.value.code, refused.value.param) == (f"invalid_{param}", param)
    assert str(refused.value) == "the file has preference rows, but supervised learns from conversation rows"


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_check_that_finds_other_rows_fails_the_job(world: World, param: str):
    files = {"training_file": world.add_file(kind="conversation")}
    files |= {param: world.upload().id}
    job = world.add_job(**files, spec=FROM_CONVERSATIONS)

    world.check(files[param], kind="document")

    failed = world.job(job.id)
    assert failed.status == "failed"
    assert failed.error == {
        "code": f"invalid_{param}",
        "message": "the file has document rows, but supervised learns from conversation rows",
        "param": param,
    }


def mix(*files: str) -> dict:
    return FROM_CONVERSATIONS | {"training_files": [{"file": file, "weight": 1.0} for file in files]}


def test_a_job_on_several_files_waits_for_all_and_keeps_them(world: World):
    files = [world.upload().id for _ in range(3)]
    job = world.add_job(files[0], spec=mix(*files))
    for file in files[:2]:
        world.check(file, kind="conversation")
        assert world.job(job.id).status == "validating_files"
        with pytest.raises(Conflict, match="is used by"):
            world.delete_file(file)
    world.check(files[2], kind="conversation")
    assert world.job(job.id).status == "queued"


def test_one_of_several_files_that_does_not_fit_fails_the_job(world: World):
    files = [world.upload().id for _ in range(2)]
    job = world.add_job(files[0], spec=mix(*files))
    world.check(files[1], kind="document")
    failed = world.job(job.id)
    assert failed.error is not None
    assert (failed.status, failed.error["code"]) == ("failed", "invalid_training_file")
    assert failed.error["param"] == "training_files.1.file"


def test_a_fitting_file_moves_the_job_on(world: World):
    file = world.upload()
    job = world.add_job(file.id, validation_file=world.add_file(kind="conversation"), spec=FROM_CONVERSATIONS)

    world.check(file.id, kind="conversation")

    assert world.job(job.id).status == "queued"


def test_a_method_may_learn_from_rows_of_several_kinds(world: World):
    spec = {"method": {"type": "ppo"}, "learns_from": ["prompt", "conversation"]}

    for kind in ("prompt", "conversation"):
        assert world.add_job(world.add_file(kind=kind), method="ppo", spec=spec).status == "queued"
    with pytest.raises(Conflict, match="ppo learns from prompt or conversation rows"):
        world.add_job(world.add_file(kind="document"), method="ppo", spec=spec)


def test_files_and_jobs_from_before_kinds_were_known_are_taken_as_they_are(world: World):
    unknown_rows = world.add_job(world.add_file(), spec=FROM_CONVERSATIONS)
    unknown_needs = world.add_job(world.add_file(kind="preference"), spec={"method": {"type": "supervised"}})

    assert {unknown_rows.status, unknown_needs.status} == {"queued"}
