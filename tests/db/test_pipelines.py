"""Pipelines: in which order stages run, what the end of one reaches, and what is refused."""

from collections.abc import Callable

import pytest

from db import jobs, pipelines, registry, tasks
from db.errors import Conflict, NotFound
from db.models import Job, Pipeline
from db.pipelines import NewStage
from tests.db.pipes import Pipe, upload_unchecked
from tests.db.world import ERROR, World

# --- order --------------------------------------------------------------------------------------------------


def test_stages_run_in_order_and_start_from_what_was_made(world: World, four: list[NewStage]):
    pipe = Pipe(world, *four)
    assert pipe.row.id.startswith("pipe-")
    assert pipe.statuses() == {"pt": "queued", "sft": "waiting", "rm": "waiting", "rl": "waiting"}
    assert world.history(pipe.job("sft").id) == []
    promised = {name: pipe.job(name).model_id for name in ("sft", "rm", "rl")}

    made = {"pt": pipe.finish("pt").fine_tuned_model}
    assert pipe.statuses() == {"pt": "succeeded", "sft": "queued", "rm": "waiting", "rl": "waiting"}
    made["sft"] = pipe.finish("sft").fine_tuned_model
    assert pipe.statuses() == {"pt": "succeeded", "sft": "succeeded", "rm": "queued", "rl": "waiting"}
    made["rm"] = pipe.finish("rm").fine_tuned_model
    assert pipe.statuses()["rl"] == "queued"
    made["rl"] = pipe.finish("rl").fine_tuned_model
    assert set(pipe.statuses().values()) == {"succeeded"}

    assert promised == {"sft": made["pt"], "rm": made["sft"], "rl": made["sft"]}
    rl = pipe.job("rl")
    assert rl.model_id == made["sft"]
    assert rl.spec["method"]["ppo"]["hyperparameters"]["reward_model"] == made["rm"]
    with world.database.read() as session:
        models = {name: registry.get(session, str(made[name]), org_id=world.org_id) for name in made}
        assert [models[name].parent_id for name in ("pt", "sft", "rm", "rl")] == [
            "base",
            made["pt"],
            made["sft"],
            made["sft"],
        ]
        assert rl.model_pk == models["sft"].pk
    assert world.history(rl.id) == ["queued", "running", "succeeded"]


def test_stages_may_be_given_in_any_order(world: World, four: list[NewStage]):
    pipe = Pipe(world, *four[::-1])

    assert list(pipe.statuses()) == ["rl", "rm", "sft", "pt"]
    assert pipe.statuses()["pt"] == "queued"
    assert [pipe.job(name).id for name in ("pt", "sft", "rm", "rl")] == sorted(
        stage.job.id for stage in pipe.stages().values()
    )


def test_a_stage_waits_for_its_file_when_its_model_is_there(world: World, stage: Callable[..., NewStage]):
    unchecked = upload_unchecked(world)
    pipe = Pipe(world, stage("a"), stage("b", model_from="a", file=unchecked.id))
    pipe.finish("a")
    assert pipe.statuses()["b"] == "validating_files"

    world.check(unchecked.id)

    assert pipe.statuses()["b"] == "queued"
    assert world.history(pipe.job("b").id) == ["validating_files", "queued"]


def test_a_file_that_is_checked_meanwhile_does_not_start_a_stage(
    world: World, stage: Callable[..., NewStage]
):
    unchecked = upload_unchecked(world)
    pipe = Pipe(world, stage("a"), stage("b", model_from="a", file=unchecked.id))

    world.check(unchecked.id)

    assert pipe.statuses() == {"a": "queued", "b": "waiting"}
    pipe.finish("a")
    assert pipe.statuses()["b"] == "queued"


def test_the_status_of_a_pipeline(world: World, four: list[NewStage]):
    pipe = Pipe(world, *four)
    assert pipe.status() == "queued"
    lease = pipe.to_merging("pt")
    assert pipe.status() == "running"
    assert pipelines.finished_at(pipe.row, list(pipe.stages().values())) is None
    world.merge(lease)
    world.pause(pipe.job("sft").id)
    assert pipe.status() == "paused"
    world.resume(pipe.job("sft").id)
    for name in ("sft", "rm", "rl"):
        pipe.finish(name)
    assert pipe.status() == "succeeded"
    assert pipelines.finished_at(pipe.row, list(pipe.stages().values())) == pipe.job("rl").finished_at


# --- ends ---------------------------------------------------------------------------------------------------


def test_a_failure_stops_what_depends_on_it_and_nothing_else(world: World, stage: Callable[..., NewStage]):
    pipe = Pipe(world, stage("a"), stage("b", model_from="a"), stage("c", model_from="b"), stage("d", seed=8))
    pipe.fail(pipe.start("a"))

    assert pipe.statuses() == {"a": "failed", "b": "failed", "c": "failed", "d": "queued"}
    for name in ("b", "c"):
        assert pipe.job(name).error == {
            "code": "upstream_failed",
            "message": f"The stage 'a', which this one needs, failed: {ERROR['message']}",
            "param": None,
        }
        assert world.history(pipe.job(name).id) == ["failed"]
    assert pipe.status() == "queued"
    pipe.finish("d")
    assert pipe.status() == "failed"


def test_a_bad_file_fails_a_waiting_stage_at_once(world: World, stage: Callable[..., NewStage]):
    bad = upload_unchecked(world)
    pipe = Pipe(world, stage("a"), stage("b", model_from="a", file=bad.id), stage("c", model_from="b"))

    world.check(bad.id, error="Line 1: not JSON")

    assert pipe.statuses() == {"a": "queued", "b": "failed", "c": "failed"}
    assert (pipe.job("b").error or {})["code"] == "invalid_training_file"
    assert (pipe.job("c").error or {})["code"] == "upstream_failed"


def test_a_bad_file_of_several_stages(world: World, stage: Callable[..., NewStage]):
    bad = upload_unchecked(world)
    pipe = Pipe(
        world,
        stage("a", file=bad.id),
        stage("b", model_from="a", file=bad.id),
        stage("c", model_from="b"),
        stage("d"),
    )

    world.check(bad.id, error="Line 1: not JSON")

    assert pipe.statuses() == {"a": "failed", "b": "failed", "c": "failed", "d": "queued"}


def test_a_stage_that_runs_out_of_attempts_fails_what_depends_on_it(
    world: World, stage: Callable[..., NewStage]
):
    pipe = Pipe(world, stage("a"), stage("b", model_from="a"))
    for _ in range(3):
        world.give_back(world.take())
        world.skip_delays()

    assert pipe.statuses() == {"a": "failed", "b": "failed"}


def test_the_cancellation_of_a_job_cancels_what_depends_on_it(world: World, four: list[NewStage]):
    pipe = Pipe(world, *four)
    pipe.finish("pt")

    world.cancel(pipe.job("sft").id)

    assert pipe.statuses() == {"pt": "succeeded", "sft": "cancelled", "rm": "cancelled", "rl": "cancelled"}


def test_a_waiting_job_can_be_cancelled_but_not_paused(world: World, four: list[NewStage]):
    pipe = Pipe(world, *four)
    with pytest.raises(Conflict) as refused:
        world.pause(pipe.job("rm").id)
    assert refused.value.code == "job_not_pausable"

    world.cancel(pipe.job("rm").id)

    assert pipe.statuses() == {"pt": "queued", "sft": "waiting", "rm": "cancelled", "rl": "cancelled"}


def test_a_pipeline_is_cancelled_as_a_whole(world: World, stage: Callable[..., NewStage]):
    pipe = Pipe(world, stage("a"), stage("b", model_from="a"), stage("c", model_from="b"), stage("d", seed=8))
    running = pipe.start("a")
    pipe.cancel()

    assert pipe.statuses() == {"a": "running", "b": "cancelled", "c": "cancelled", "d": "cancelled"}
    assert pipe.status() == "running"
    with tasks.fenced(world.database, running) as session:
        jobs.cancel(session, running)
    assert pipe.status() == "cancelled"
    with pytest.raises(Conflict) as refused:
        pipe.cancel()
    assert refused.value.code == "pipeline_not_cancellable"


def test_a_stage_that_finishes_after_the_cancellation_starts_nothing(
    world: World, stage: Callable[..., NewStage]
):
    pipe = Pipe(world, stage("a"), stage("b", model_from="a"))
    merging = pipe.to_merging("a")
    pipe.cancel()

    world.merge(merging)

    assert pipe.statuses() == {"a": "succeeded", "b": "cancelled"}


# --- refusals -----------------------------------------------------------------------------------------------


def refuse(world: World, *new_stages: NewStage) -> tuple[str, str | None]:
    with pytest.raises(Conflict) as refused:
        Pipe(world, *new_stages)
    with world.database.read() as session:
        assert session.query(Pipeline).count() == 0
        assert session.query(Job).count() == 0
    return refused.value.code, refused.value.param


def test_what_can_never_run_is_refused_as_a_whole(world: World, stage: Callable[..., NewStage]):
    a, reward = stage("a"), stage("r", method="reward")
    assert refuse(world, a, stage("b", model_from="x")) == ("unknown_stage", "stages.1.model.stage")
    assert refuse(world, a, a) == ("invalid_value", "stages.1.name")
    assert refuse(world, stage("a", model_from="a")) == ("pipeline_cycle", "stages.0.model.stage")
    circle = [a, stage("b", model_from="d"), stage("c", model_from="b"), stage("d", model_from="c")]
    assert refuse(world, *circle) == ("pipeline_cycle", "stages.1.model.stage")
    downstream = [stage("z", model_from="b"), *circle]
    assert refuse(world, *downstream) == ("pipeline_cycle", "stages.2.model.stage")
    assert refuse(world, reward, stage("b", model_from="r")) == (
        "model_not_trainable",
        "stages.1.model.stage",
    )
    assert refuse(world, a, stage("b", model_from="a", reward_model="a", method="ppo")) == (
        "not_a_reward_model",
        "stages.1.method.ppo.hyperparameters.reward_model.stage",
    )
    assert refuse(world, a, stage("b", model="x")) == ("model_not_found", "stages.1.model")
    assert refuse(world, a, stage("b", model_from="a", file="file-x")) == (
        "not_found",
        "stages.1.training_file",
    )
    assert refuse(world, a, stage("b", model_from="a", validation_file="file-x")) == (
        "not_found",
        "stages.1.validation_file",
    )


def test_a_file_that_does_not_fit_a_waiting_stage(world: World, stage: Callable[..., NewStage]):
    pairs = world.add_file(kind="preference")
    spec = {"method": {"type": "supervised"}, "learns_from": ["conversation"]}
    unfit = stage("b", model_from="a", file=pairs, spec=spec)

    assert refuse(world, stage("a"), unfit) == ("invalid_training_file", "stages.1.training_file")


def test_other_tenants_have_no_pipeline(world: World, stage: Callable[..., NewStage]):
    pipe = Pipe(world, stage("a"))
    other = world.other("other")
    with world.database.write() as session:
        with pytest.raises(NotFound):
            pipelines.get(session, pipe.row.id, org_id=other.org_id)
        with pytest.raises(NotFound):
            pipelines.cancel(session, pipe.row.id, org_id=other.org_id)
        assert pipelines.list_page(session, org_id=other.org_id, after=None, limit=9).rows == []
        assert pipelines.stages_of(session, [pipe.row], org_id=other.org_id)[pipe.row.id] == []


def test_the_model_and_the_files_of_a_waiting_stage_stay(world: World, four: list[NewStage]):
    pipe = Pipe(world, *four)
    pipe.finish("pt")
    made = str(pipe.finish("sft").fine_tuned_model)
    with pytest.raises(Conflict) as refused:  # `rl` waits for `rm` only, and holds its model already
        registry.delete(world.database, made, org_id=world.org_id)
    assert refused.value.code == "model_in_use"
    judge = str(pipe.finish("rm").fine_tuned_model)
    with pytest.raises(Conflict, match=pipe.job("rl").id):
        registry.delete(world.database, judge, org_id=world.org_id)
    with pytest.raises(Conflict):
        world.delete_file(four[3].job.training_file)
    pipe.finish("rl")
    registry.delete(world.database, judge, org_id=world.org_id)
    world.delete_file(four[3].job.training_file)
