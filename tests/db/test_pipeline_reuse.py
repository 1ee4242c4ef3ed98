"""What a pipeline that is run again need not do again."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update

from db import pipelines, registry
from db.errors import Conflict
from db.models import Model
from db.pipelines import NewStage
from tests.db.pipes import Pipe
from tests.db.world import World


def run_four(world: World, four: list[NewStage]) -> Pipe:
    pipe = Pipe(world, *four)
    for name in ("pt", "sft", "rm", "rl"):
        pipe.finish(name)
    return pipe


def test_a_second_run_reuses_everything(world: World, four: list[NewStage]):
    first = run_four(world, four)

    second = Pipe(world, *four)

    assert second.row.id != first.row.id
    for name, stage_ in second.stages().items():
        assert stage_.row.reused
        assert stage_.job.id == first.job(name).id
        assert not first.stages()[name].row.reused
    assert second.status() == "succeeded"
    assert pipelines.finished_at(second.row, list(second.stages().values())) == second.row.created_at
    with pytest.raises(Conflict):
        second.cancel()


def test_a_changed_stage_and_what_depends_on_it_run_again(world: World, stage: Callable[..., NewStage]):
    def stages(seed: int) -> list[NewStage]:
        return [stage("a"), stage("b", model_from="a", seed=seed), stage("c", model_from="b")]

    first = Pipe(world, *stages(1))
    for name in ("a", "b", "c"):
        first.finish(name)

    second = Pipe(world, *stages(2))

    assert {name: found.row.reused for name, found in second.stages().items()} == {
        "a": True,
        "b": False,
        "c": False,
    }
    assert second.statuses() == {"a": "succeeded", "b": "queued", "c": "waiting"}
    assert second.job("b").model_id == first.job("a").fine_tuned_model


def test_a_failed_pipeline_goes_on_where_it_failed(world: World, stage: Callable[..., NewStage]):
    stages = [stage("a"), stage("b", model_from="a")]
    first = Pipe(world, *stages)
    first.finish("a")
    first.fail(first.start("b"))

    second = Pipe(world, *stages)

    assert second.statuses() == {"a": "succeeded", "b": "queued"}
    second.finish("b")
    assert second.status() == "succeeded"


def test_the_same_rows_under_another_name_are_the_same_input(world: World, stage: Callable[..., NewStage]):
    old, new = world.add_file(b"rows"), world.add_file(b"rows")
    first = Pipe(world, stage("a", file=old))
    first.finish("a")
    world.delete_file(old)

    assert Pipe(world, stage("a", file=new, suffix="v2")).stages()["a"].row.reused


@pytest.mark.parametrize(
    "said",
    [
        {"filename": "a.txt"},
        {"filename": "a.jsonl.gz"},
        {"format": "alpaca"},
        {"column_map": {"prompt": "q"}},
        {"max_invalid_fraction": 0.1},
    ],
)
def test_the_same_bytes_read_in_another_way_are_other_rows(
    world: World, stage: Callable[..., NewStage], said: dict[str, Any]
):
    Pipe(world, stage("a", file=world.add_file(b"rows"))).finish("a")

    assert not Pipe(world, stage("a", file=world.add_file(b"rows", **said))).stages()["a"].row.reused


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"method": "pretraining"},
        {"spec": {"method": {"type": "supervised", "supervised": {"hyperparameters": {"lora_rank": 4}}}}},
        {"resources": {"nproc_per_node": 2, "nnodes": 1}},
        {"model": "other"},
    ],
)
def test_another_input_is_not_reused(world: World, stage: Callable[..., NewStage], change: dict[str, Any]):
    world.add_model("other", digest="f" * 64)
    Pipe(world, stage("a")).finish("a")

    assert not Pipe(world, stage("a", **change)).stages()["a"].row.reused


def test_other_rows_and_another_validation_file_are_not_reused(world: World, stage: Callable[..., NewStage]):
    Pipe(world, stage("a")).finish("a")

    assert not Pipe(world, stage("a", file=world.add_file())).stages()["a"].row.reused
    assert not Pipe(world, stage("a", validation_file=world.add_file())).stages()["a"].row.reused


def test_another_reward_model_is_another_input(world: World, four: list[NewStage]):
    first = run_four(world, four)
    reward_model = first.job("rm").fine_tuned_model
    world.run(update(Model).where(Model.id == reward_model).values(digest="f" * 64))

    reused = {name: found.row.reused for name, found in Pipe(world, *four).stages().items()}

    assert reused == {"pt": True, "sft": True, "rm": True, "rl": False}


def test_a_deleted_result_is_made_again(world: World, stage: Callable[..., NewStage]):
    first = Pipe(world, stage("a"))
    model_id = str(first.finish("a").fine_tuned_model)
    registry.delete(world.database, model_id, org_id=world.org_id)

    assert not Pipe(world, stage("a")).stages()["a"].row.reused


def test_nothing_of_others_is_reused(world: World, stage: Callable[..., NewStage]):
    Pipe(world, stage("a", file=world.add_file(b"rows"))).finish("a")
    other = world.other("other")

    assert not Pipe(other, stage("a", file=other.add_file(b"rows"))).stages()["a"].row.reused


def test_ordinary_jobs_are_not_stages(world: World, stage: Callable[..., NewStage]):
    made = stage("a")
    world.add_job(**vars(made.job))
    world.train(world.take())
    world.merge(world.take("cpu"))

    assert not Pipe(world, made).stages()["a"].row.reused
