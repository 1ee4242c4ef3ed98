"""Models come to be, are served and go; two requests at once make one of each."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db import deployments, recovery, registry, tasks
from db.errors import Conflict, NotFound
from db.models import Deployment, Model
from tests.db.world import World, race


def start_import(world: World, model_id: str = "new") -> Model:
    with world.database.write() as session:
        return registry.start_import(session, org_id=world.org_id, model_id=model_id, source="/models/new")


def ensure(world: World, model: Model, *, auto: bool = False) -> Deployment:
    with world.database.write() as session:
        return deployments.ensure(session, model, org_id=world.org_id, auto=auto)


def adopt(world: World, node: str = "node-1") -> None:
    with world.database.write() as session:
        deployments.adopt(session, node=node)


def report(world: World, deployment: Deployment, **values: Any) -> None:
    with world.database.write() as session:
        deployments.report(session, deployment.id, **values)


def stop(world: World, deployment: Deployment) -> Deployment:
    with world.database.write() as session:
        return deployments.stop(session, deployment.id, org_id=world.org_id)


def deployment_of(world: World, deployment: Deployment) -> Deployment:
    with world.database.read() as session:
        return deployments.get(session, deployment.id, org_id=world.org_id)


def add_merged(world: World, model_id: str = "mine") -> Model:
    model = world.add_model(model_id, kind="merged", public=False)
    Path(str(model.path)).mkdir(parents=True)
    return model


def test_an_import_is_work_for_one_worker(world: World):
    model = start_import(world)
    assert (model.status, model.kind, model.public) == ("importing", "base", True)
    with world.database.read() as session, pytest.raises(Conflict) as caught:
        registry.get_ready(session, "new", org_id=world.org_id)
    assert caught.value.code == "model_not_ready"

    lease = world.take("cpu")
    assert (lease.kind, lease.subject_id) == ("import", str(model.pk))
    with tasks.fenced(world.database, lease) as session:
        registry.record_import(session, model.pk, path=Path("/m"), report={"digest": "d", "parameters": 5})
        tasks.finish(session, lease, outcome="done")

    with world.database.read() as session:
        ready = registry.get_ready(session, "new", org_id=world.org_id)
    assert (ready.status, ready.path, ready.digest, ready.details) == ("ready", "/m", "d", {"parameters": 5})


def test_a_model_id_is_taken_until_its_import_fails(world: World):
    model = start_import(world)
    for taken in ("new", "base"):
        with pytest.raises(Conflict) as caught:
            start_import(world, taken)
        assert caught.value.code == "model_exists"

    with world.database.write() as session:
        registry.fail_import(session, model.pk, code="unsafe", message="It holds a pickle.")
    with world.database.read() as session:
        failed = registry.get(session, "new", org_id=world.org_id)
        assert (failed.status, failed.error) == (
            "failed",
            {"code": "unsafe", "message": "It holds a pickle."},
        )
    again = start_import(world)

    assert again.pk != model.pk
    with world.database.read() as session:
        assert registry.get(session, "new", org_id=world.org_id).pk == again.pk


def test_an_import_that_dies_on_every_attempt_fails(world: World):
    start_import(world)

    for _ in range(3):
        world.expire(world.take("cpu"))
        assert recovery.reap(world.database, ttl_s=0) == 1

    with world.database.read() as session:
        failed = registry.get(session, "new", org_id=world.org_id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "worker_lost"
    assert world.claim("cpu") is None


def test_one_of_many_imports_of_an_id_begins(world: World):
    outcomes = race(*[lambda: start_import(world)] * 6)

    assert sum(isinstance(outcome, Model) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 5


@pytest.mark.parametrize(
    "values",
    [
        {"status": "ready", "path": None, "digest": "d"},
        {"status": "ready", "path": "/m", "digest": None},
        {"status": "lost"},
        {"kind": "adapter"},
        {"model_id": "base"},
    ],
    ids=str,
)
def test_the_database_itself_refuses_impossible_models(world: World, values: dict[str, Any]):
    with pytest.raises(IntegrityError):
        world.add_model(**({"model_id": "odd"} | values))


def test_a_job_makes_one_model(world: World):
    world.add_model("ft:1", kind="merged", public=False, job_id="ftjob-1")

    with pytest.raises(IntegrityError):
        world.add_model("ft:2", kind="merged", public=False, job_id="ftjob-1")


def test_models_are_listed_oldest_first(world: World):
    world.run(update(Model).values(created_at=2.0))
    world.add_model("b", created_at=3.0)
    world.add_model("a", created_at=3.0)
    world.add_model("gone", created_at=1.0, deleted_at=1.0)

    with world.database.read() as session:
        assert [model.id for model in registry.list_all(session, org_id=world.org_id)] == ["base", "b", "a"]


def test_lineage_names_the_parent_and_the_root(world: World):
    world.add_model("org/base-2")
    first = world.add_job(model="org/base-2")
    world.train(world.take())
    merged = world.merge(world.take("cpu")).fine_tuned_model
    world.add_job(model=merged, suffix="two")
    world.train(world.take())
    second = world.merge(world.take("cpu")).fine_tuned_model

    with world.database.read() as session:
        one = registry.get(session, str(merged), org_id=world.org_id)
        two = registry.get(session, str(second), org_id=world.org_id)
    assert (one.parent_id, one.root_id, one.job_id) == ("org/base-2", "org/base-2", first.id)
    assert (two.parent_id, two.root_id) == (merged, "org/base-2")
    assert one.id.startswith("ft:org--base-2:default::")
    assert two.id.startswith("ft:org--base-2:default:two:")


def test_deletion_takes_the_folder_and_ends_automatic_deployments(world: World):
    model = add_merged(world)
    deployment = ensure(world, model, auto=True)

    registry.delete(world.database, "mine", org_id=world.org_id)

    assert not Path(str(model.path)).exists()
    with world.database.read() as session, pytest.raises(NotFound):
        registry.get(session, "mine", org_id=world.org_id)
    with pytest.raises(NotFound):
        registry.delete(world.database, "mine", org_id=world.org_id)
    ended = deployment_of(world, deployment)
    assert (ended.desired, ended.status) == ("stopped", "stopped")
    assert ended.stopped_at is not None


def test_deletion_leaves_a_running_automatic_engine_to_its_node(world: World):
    deployment = ensure(world, add_merged(world), auto=True)
    adopt(world)
    report(world, deployment, status="ready", address="http://127.0.0.1:9")

    registry.delete(world.database, "mine", org_id=world.org_id)

    ending = deployment_of(world, deployment)
    assert (ending.desired, ending.status) == ("stopped", "ready")


def test_a_model_in_use_is_not_deleted(world: World):
    model = add_merged(world)
    job = world.add_job(model="mine")

    def refused() -> str:
        with pytest.raises(Conflict) as caught:
            registry.delete(world.database, "mine", org_id=world.org_id)
        assert Path(str(model.path)).is_dir()
        return f"{caught.value.code}: {caught.value}"

    assert refused() == f"model_in_use: The model 'mine' is used by {job.id}."
    world.cancel(job.id)
    deployment = ensure(world, model)
    assert refused() == f"model_in_use: The model 'mine' is used by {deployment.id}."
    adopt(world)
    stop(world, deployment)
    assert refused() == f"model_in_use: The model 'mine' is used by {deployment.id}."
    report(world, deployment, status="stopped")
    registry.delete(world.database, "mine", org_id=world.org_id)


def test_a_base_model_is_deleted_only_if_it_never_worked(world: World):
    with pytest.raises(Conflict) as caught:
        registry.delete(world.database, "base", org_id=world.org_id)
    assert caught.value.code == "model_not_deletable"

    world.add_model("broken", status="failed", path=None, digest=None)
    registry.delete(world.database, "broken", org_id=world.org_id)


@pytest.mark.parametrize("status", ["failed", "importing"])
def test_another_tenant_deletes_no_public_base(world: World, status: str):
    world.add_model("shared", status=status, path=None, digest=None)
    other = world.other("clinic")

    with pytest.raises(Conflict) as caught:
        registry.delete(other.database, "shared", org_id=other.org_id)
    assert caught.value.code == "model_not_deletable"


def test_a_model_is_not_deleted_under_its_import(world: World):
    world.add_model("coming", status="importing", path=None, digest=None)

    with pytest.raises(Conflict) as caught:
        registry.delete(world.database, "coming", org_id=world.org_id)
    assert caught.value.code == "model_not_deletable"


def test_another_tenant_sees_and_deletes_no_private_model(world: World):
    model = add_merged(world)
    other = world.other("clinic")

    with other.database.read() as session, pytest.raises(NotFound):
        registry.get(session, "mine", org_id=other.org_id)
    with pytest.raises(NotFound):
        registry.delete(other.database, "mine", org_id=other.org_id)

    assert Path(str(model.path)).is_dir()


def test_a_model_has_one_live_deployment(world: World):
    model = add_merged(world)

    outcomes = race(*[lambda: ensure(world, model, auto=True)] * 8)

    assert len({outcome.id for outcome in outcomes}) == 1
    with world.database.read() as session:
        assert len(session.scalars(select(Deployment)).all()) == 1


def test_the_database_itself_refuses_a_second_live_deployment(world: World):
    deployment = ensure(world, add_merged(world))
    values = {column.key: getattr(deployment, column.key) for column in Deployment.__table__.columns}

    with pytest.raises(IntegrityError):
        world.run(insert(Deployment).values(**(values | {"id": "dep-2"})))
    with pytest.raises(IntegrityError):
        world.run(update(Deployment).values(status="ready", address=None))


def test_a_user_makes_an_automatic_deployment_his(world: World):
    model = add_merged(world)
    automatic = ensure(world, model, auto=True)

    assert ensure(world, model, auto=False).id == automatic.id
    assert not deployment_of(world, automatic).auto
    ensure(world, model, auto=True)
    assert not deployment_of(world, automatic).auto


def test_a_failed_deployment_is_tried_again_when_asked_for(world: World):
    model = add_merged(world)
    deployment = ensure(world, model)
    adopt(world)
    report(world, deployment, status="failed", error={"code": "engine_failed"}, restarts=4)
    assert deployment_of(world, deployment).restarts == 4

    ensure(world, model)

    again = deployment_of(world, deployment)
    assert (again.status, again.error, again.restarts, again.node) == ("pending", None, 0, "node-1")


def test_the_road_of_a_deployment(world: World):
    model = add_merged(world)
    deployment = ensure(world, model)
    assert (deployment.status, deployment.desired, deployment.node) == ("pending", "running", None)

    adopt(world)
    adopt(world, "node-2")
    with world.database.read() as session:
        ((found, served),) = deployments.of_node(session, node="node-1")
        assert deployments.of_node(session, node="node-2") == []
    assert (found.id, served.path) == (deployment.id, model.path)
    report(world, deployment, status="loading")
    report(world, deployment, status="ready", address="http://127.0.0.1:9")
    with world.database.read() as session:
        live = deployments.find_live(session, model, org_id=world.org_id)
    assert live is not None
    assert (live.status, live.address) == ("ready", "http://127.0.0.1:9")

    assert stop(world, deployment).status == "ready"
    report(world, deployment, status="stopped")

    ended = deployment_of(world, deployment)
    assert (ended.status, ended.desired, ended.address) == ("stopped", "stopped", None)
    assert ended.stopped_at is not None
    with world.database.read() as session:
        assert deployments.find_live(session, model, org_id=world.org_id) is None
        assert deployments.of_node(session, node="node-1") == []
    assert ensure(world, model).id != deployment.id


def test_a_deployment_no_node_has_ends_at_once(world: World):
    deployment = stop(world, ensure(world, add_merged(world)))

    assert (deployment.status, deployment.desired) == ("stopped", "stopped")
    adopt(world)
    assert deployment_of(world, deployment).node is None


def test_the_least_recently_used_comes_first(world: World):
    made = [ensure(world, add_merged(world, f"m{number}")) for number in range(3)]
    adopt(world)
    with world.database.write() as session:
        deployments.touch(session, made[0].id)

    with world.database.read() as session:
        order = [deployment.id for deployment, _ in deployments.of_node(session, node="node-1")]

    assert order == [made[1].id, made[2].id, made[0].id]


def test_a_reward_model_judges_and_its_checkpoint_does_not(world: World) -> None:
    world.add_model("judge", details={"head": "score"})
    world.add_model("judge:ckpt-step-1", kind="checkpoint", public=False, details={"head": "score"})

    def hold(session: Session, name: str) -> Model | None:
        method = {"type": "ppo", "ppo": {"hyperparameters": {"reward_model": name}}}
        return registry.hold_judge(session, {"method": method}, org_id=world.org_id)

    with world.database.write() as session:
        judge = hold(session, "judge")
        assert judge is not None
        assert judge.id == "judge"
        with pytest.raises(Conflict, match="is a checkpoint"):
            hold(session, "judge:ckpt-step-1")
