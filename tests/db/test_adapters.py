"""Adapters of jobs: which job may start from one, that it stays for that job, what it may be merged into."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from db import adapters, checkpoints, jobs, registry
from db.errors import Conflict, NotFound
from db.models import Job, Model
from db.pipelines import NewStage
from tests.db.pipes import Pipe
from tests.db.world import ERROR, World, run_against_open

SHAPE = {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": None}
PARAM = "method.supervised.hyperparameters"


def spec(adapter: str, method: str = "supervised", **more: Any) -> dict[str, Any]:
    return {"method": {"type": method, method: {"hyperparameters": {"init_adapter": adapter} | more}}}


def add_trained(world: World, *, resolved: dict[str, Any] | None = None, **changes: Any) -> Job:
    """A job that has succeeded, with the shape of its adapter."""
    job = world.add_job(**changes)
    world.train(world.take())
    world.run(update(Job).where(Job.id == job.id).values(resolved=SHAPE | (resolved or {})))
    return world.merge(world.take("cpu"))


def add_checkpoint(world: World, job_id: str, step: int = 4) -> None:
    with world.database.write() as session:
        job = session.get_one(Job, job_id)
        checkpoints.record(
            session, job, step=step, path=world.home / "ckpt", manifest_sha256="c" * 64, metrics={}
        )


def start_from(world: World, adapter: str, **more: Any) -> Job:
    return world.add_job(spec=spec(adapter, **more))


def refuse(world: World, adapter: str, **changes: Any) -> tuple[str, str | None, str]:
    with pytest.raises(Conflict) as refused:
        world.add_job(**({"spec": spec(adapter)} | changes))
    return refused.value.code, refused.value.param, str(refused.value)


def hyperparameters(job: Job) -> dict[str, Any]:
    return job.spec["method"][job.method]["hyperparameters"]


def test_it_is_named_by_its_job_its_model_or_a_checkpoint_and_gives_its_shape(world: World):
    trained = add_trained(world)
    add_checkpoint(world, trained.id)
    with world.database.read() as session:
        page = checkpoints.list_page(session, org_id=world.org_id, job_id=trained.id, after=None, limit=1)
        checkpoint = page.rows[0]
    model_id = str(trained.fine_tuned_model)
    for name, known_as in {
        trained.id: model_id,
        model_id: model_id,
        checkpoint.id: checkpoint.name,
        checkpoint.name: checkpoint.name,
    }.items():
        started = hyperparameters(start_from(world, name))
        assert started == {"init_adapter": known_as, **SHAPE}


def test_what_is_asked_for_must_be_what_the_adapter_is(world: World):
    trained = add_trained(world)
    started = hyperparameters(start_from(world, trained.id, lora_rank=4, target_modules=["q_proj"]))
    assert started["lora_rank"] == 4

    code, param, message = refuse(world, trained.id, spec=spec(trained.id, lora_alpha=16))
    assert (code, param) == ("adapter_misfit", f"{PARAM}.lora_alpha")
    assert "16" in message
    assert "8" in message


def test_another_base_is_refused_with_both_digests(world: World):
    trained = add_trained(world)
    world.add_model("other", digest="f" * 64)
    code, param, message = refuse(world, trained.id, model="other")
    assert (code, param) == ("wrong_base", f"{PARAM}.init_adapter")
    assert "d" * 64 in message
    assert "f" * 64 in message
    # The same bytes under another name are the same base.
    world.add_model("copy", digest="d" * 64)
    world.add_job(model="copy", spec=spec(trained.id))


@pytest.mark.parametrize(
    ("prepare", "code"),
    [
        (lambda _: "ftjob-nowhere", "adapter_not_found"),
        (lambda _: "base", "no_adapter"),
        (lambda world: world.add_job().id, "no_adapter"),
        (lambda world: add_trained(world, resolved={"use_peft": False}).id, "no_adapter"),
        (lambda world: add_trained(world, resolved={"new_tokens": 5}).id, "adapter_misfit"),
        (lambda world: add_trained(world, method="reward").id, "adapter_misfit"),
        (lambda world: add_trained(world.other("strangers")).id, "adapter_not_found"),
    ],
)
def test_what_is_no_adapter_to_start_from(world: World, prepare: Callable[[World], str], code: str):
    assert refuse(world, prepare(world))[:2] == (code, f"{PARAM}.init_adapter")


def test_a_reward_model_goes_on_as_a_reward_model(world: World):
    trained = add_trained(world, method="reward")
    started = world.add_job(method="reward", spec=spec(trained.id, "reward"))
    assert hyperparameters(started)["init_adapter"] == trained.fine_tuned_model


def test_a_checkpoint_of_a_job_that_goes_on_may_yet_be_dropped(world: World):
    job = world.add_job()
    lease = world.take()
    add_checkpoint(world, job.id)
    with world.database.read() as session:
        page = checkpoints.list_page(session, org_id=world.org_id, job_id=job.id, after=None, limit=1)
        name = page.rows[0].id
    assert refuse(world, name)[0] == "adapter_not_settled"
    with world.database.write() as session:
        jobs.fail(session, lease, error=ERROR)
    start_from(world, name)


def test_the_adapter_stays_until_the_job_is_over(world: World):
    trained = add_trained(world)
    model_id = str(trained.fine_tuned_model)
    job = start_from(world, trained.id)
    with pytest.raises(Conflict, match=job.id):
        registry.delete(world.database, model_id, org_id=world.org_id)
    world.cancel(job.id)
    registry.delete(world.database, model_id, org_id=world.org_id)
    assert refuse(world, trained.id)[0] == "adapter_not_found"


def test_a_model_stays_while_a_job_starts_from_a_checkpoint_on_it(world: World):
    first = add_trained(world)
    second = add_trained(world, model=str(first.fine_tuned_model))
    add_checkpoint(world, second.id)
    name = f"{second.fine_tuned_model}:ckpt-step-4"
    world.add_model("copy", digest="e" * 64, path=str(Path(world.home) / "elsewhere"))
    job = world.add_job(
        model="copy", spec=spec(name)
    )  # of the same bytes, so that only the adapter is shared
    with pytest.raises(Conflict, match=job.id):
        registry.delete(world.database, str(first.fine_tuned_model), org_id=world.org_id)


def test_a_deletion_and_a_submission_at_once(world: World):
    trained = add_trained(world)
    model_id = str(trained.fine_tuned_model)
    _, deleted = run_against_open(
        world.database,
        lambda session: jobs.create(
            session, world.new_job(trained.training_file, spec=spec(trained.id)), org_id=world.org_id
        ),
        lambda: registry.delete(world.database, model_id, org_id=world.org_id),
    )
    assert isinstance(deleted, Conflict)


def test_stages_are_reused_only_with_the_same_adapter(world: World, stage: Callable[..., NewStage]):
    trained = add_trained(world)
    made = stage("a", spec=spec(trained.id))
    Pipe(world, made).finish("a")
    assert Pipe(world, made).stages()["a"].row.reused

    model_id = str(trained.fine_tuned_model)
    world.run(update(Model).where(Model.id == model_id).values(digest="f" * 64))
    assert not Pipe(world, made).stages()["a"].row.reused


def test_a_stage_on_a_model_to_be_made_has_no_adapter_yet(world: World, stage: Callable[..., NewStage]):
    trained = add_trained(world)
    with pytest.raises(Conflict, match="still to be made") as refused:
        Pipe(world, stage("a"), stage("b", model_from="a", spec=spec(trained.id)))
    assert refused.value.param == f"stages.1.{PARAM}.init_adapter"


# --- merged in order ----------------------------------------------------------------------------------------


def check_chain(world: World, *names: str, base_id: str = "base") -> None:
    with world.database.write() as session:
        adapters.check_chain(session, names, base_id=base_id, org_id=world.org_id)


def refuse_chain(world: World, *names: str) -> tuple[str, str | None, str]:
    with pytest.raises(Conflict) as refused:
        check_chain(world, *names)
    return refused.value.code, refused.value.param, str(refused.value)


def test_each_adapter_must_belong_to_the_result_of_the_one_before(world: World):
    first = add_trained(world)
    second = add_trained(world, model=str(first.fine_tuned_model))
    check_chain(world, first.id, second.id)

    code, param, message = refuse_chain(world, second.id, first.id)
    assert (code, param) == ("wrong_base", "adapters.0")
    assert "d" * 64 in message
    assert "e" * 64 in message
    assert refuse_chain(world, first.id, first.id)[:2] == ("wrong_base", "adapters.1")
    # What comes of a stranger's adapter is known only once it is merged.
    check_chain(world, "/adapters/one", second.id)
    assert refuse_chain(world, second.id, "/adapters/one")[:2] == ("wrong_base", "adapters.0")


def test_what_is_no_adapter_to_merge(world: World):
    assert refuse_chain(world, "ftjob-nowhere")[:2] == ("adapter_not_found", "adapters.0")
    unfinished = world.add_job()
    world.take()
    assert refuse_chain(world, "/adapters/one", unfinished.id)[:2] == ("no_adapter", "adapters.1")
    judge = add_trained(world, method="reward")
    assert refuse_chain(world, judge.id)[:2] == ("no_adapter", "adapters.0")
    theirs = add_trained(world.other("strangers"))
    assert refuse_chain(world, theirs.id)[:2] == ("adapter_not_found", "adapters.0")
    with pytest.raises(NotFound):
        check_chain(world, "/adapters/one", base_id="nowhere")
