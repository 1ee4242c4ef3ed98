"""Fixtures of the database suite."""

from collections.abc import Callable
from typing import Any

import pytest

from db.pipelines import NewStage
from tests.db.world import World


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
