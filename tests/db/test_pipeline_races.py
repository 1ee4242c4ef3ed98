"""Ends of stages, cancellations and checks of files that meet: nobody waits for ever, nothing is lost."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from db import jobs, pipelines, tasks
from db.errors import Conflict
from db.pipelines import NewStage
from db.tasks import Lease
from tests.db.pipes import Pipe, upload_unchecked
from tests.db.world import World, race, run_against_open


def two_branches(stage: Callable[..., NewStage], *, seed: int = 1) -> list[NewStage]:
    return [
        stage("a", seed=seed),
        stage("b", seed=seed, method="reward"),
        stage("c", model_from="a", reward_model="b", method="ppo"),
    ]


def both_merging(world: World, pipe: Pipe) -> list[Lease]:
    """The leases of the merges of `a` and `b`."""
    leases = [world.take(), world.take()]
    for lease in leases:
        world.train(lease)
    merges = [world.take("cpu"), world.take("cpu")]
    return sorted(merges, key=lambda lease: lease.subject_id != pipe.job("a").id)


def test_the_second_of_two_that_end_at_once_starts_the_third(world: World, stage: Callable[..., NewStage]):
    pipe = Pipe(world, *two_branches(stage))
    first, second = both_merging(world, pipe)

    def merge(session: Any) -> None:
        tasks.check(session, first)
        report = {"digest": "a" * 64}
        jobs.finish_merge(session, first, path=world.home / "a", adapter_path=world.home / "a", report=report)

    run_against_open(world.database, merge, lambda: world.merge(second))

    assert pipe.statuses() == {"a": "succeeded", "b": "succeeded", "c": "queued"}
    assert pipe.job("c").model_id == pipe.job("a").fine_tuned_model


@pytest.mark.parametrize("first", ["cancel", "merge"])
def test_a_cancellation_and_the_end_of_a_stage(world: World, stage: Callable[..., NewStage], first: str):
    pipe = Pipe(world, stage("a"), stage("b", model_from="a"))
    merging = pipe.to_merging("a")

    def cancel(session: Any) -> None:
        pipelines.cancel(session, pipe.row.id, org_id=world.org_id)

    def merge(session: Any) -> None:
        tasks.check(session, merging)
        report = {"digest": "a" * 64}
        jobs.finish_merge(
            session, merging, path=world.home / "a", adapter_path=world.home / "a", report=report
        )

    if first == "cancel":
        outcomes = run_against_open(world.database, cancel, lambda: world.merge(merging))
    else:
        outcomes = run_against_open(world.database, merge, pipe.cancel)

    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert pipe.statuses() == {"a": "succeeded", "b": "cancelled"}


def cancel_if_possible(world: World, job_id: str) -> None:
    with suppress(Conflict):  # it may have ended a moment ago
        world.cancel(job_id)


def test_ends_cancellations_and_checks_at_once_never_block_each_other(
    world: World, stage: Callable[..., NewStage]
):
    """Each takes several locks; in another order than that of ids, some of these would meet halfway."""
    for seed in range(5):
        file = upload_unchecked(world)
        pipe = Pipe(
            world,
            *two_branches(stage, seed=seed),
            stage("d", model_from="c", file=file.id),
            stage("e", model_from="a", file=file.id),
        )
        first, second = both_merging(world, pipe)

        outcomes = race(
            partial(world.merge, first),
            partial(pipe.fail, second),
            partial(world.check, file.id, error="Line 1: not JSON"),
            partial(cancel_if_possible, world, pipe.job("c").id),
            partial(cancel_if_possible, world, pipe.job("e").id),
        )

        assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)], outcomes
        statuses = pipe.statuses()
        assert (statuses["a"], statuses["b"]) == ("succeeded", "failed")
        assert {statuses["c"], statuses["d"], statuses["e"]} <= {"failed", "cancelled"}


def test_a_check_locks_what_depends_on_its_jobs_before_it_changes_any(
    world: World, stage: Callable[..., NewStage]
):
    """Whoever holds `c` may want `d` next, so the check must not have `d` while it waits for `c`."""
    bad = upload_unchecked(world)
    pipe = Pipe(
        world,
        stage("a"),
        stage("b", model_from="a", file=bad.id),
        stage("c", model_from="b"),
        stage("d", model_from="c", file=bad.id),
    )
    held = pipe.job("c").id

    outcomes = run_against_open(
        world.database,
        lambda session: jobs.lock_all(session, [held]),
        lambda: world.check(bad.id, error="Line 1: not JSON"),
        then=lambda session: jobs.request_cancel(session, held, org_id=world.org_id),
    )

    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert pipe.statuses() == {"a": "queued", "b": "failed", "c": "cancelled", "d": "cancelled"}


def test_a_check_and_the_end_of_the_upstream_stage(world: World, stage: Callable[..., NewStage]):
    file = upload_unchecked(world)
    pipe = Pipe(world, stage("a"), stage("b", model_from="a", file=file.id))
    merging = pipe.to_merging("a")

    outcomes = race(lambda: world.merge(merging), lambda: world.check(file.id))

    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert pipe.statuses() == {"a": "succeeded", "b": "queued"}
