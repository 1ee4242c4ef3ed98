"""Random lives of jobs of which some wait for others: the machine of all jobs, with pipelines among them."""

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from db import pipelines
from db.pipelines import NewStage
from tests.db.test_states_machine import JobMachine, Life, Work, _numbers, live_randomly
from tests.db.world import World

# What each stage is given, by the positions of those that make it.
SHAPES: list[list[dict[str, int]]] = [
    [{}, {"model": 0}, {"model": 1}],
    [{}, {}, {"model": 0, "reward_model": 1}],
    [{}, {"model": 0}, {"model": 0, "reward_model": 1}],
    [{}, {"model": 0}, {"model": 0}],
]


@dataclass
class StageLife(Life):
    """What the model knows of a stage."""

    needs: list[Life] = field(default_factory=list)


class PipelineMachine(JobMachine):
    """Jobs and pipelines side by side; a stage that waits is settled after each step."""

    @rule(
        shape=st.sampled_from(SHAPES),
        states=st.lists(st.sampled_from(["processed", "processed", "uploaded"]), min_size=3, max_size=3),
    )
    @precondition(lambda self: len(self.lives) < 5)
    def create_pipeline(self, shape: list[dict[str, int]], states: list[str]) -> None:
        judges = {needs["reward_model"] for needs in shape if "reward_model" in needs}
        files = [self._add_file(state) for state in states]
        new_stages = []
        for position, (needs, file_id) in enumerate(zip(shape, files, strict=True)):
            method = "reward" if position in judges else "ppo"
            # Numbered, so that none is another one run again.
            new = self.world.new_job(
                file_id, method=method, spec={"method": {"type": method}}, seed=next(_numbers)
            )
            named = {given: f"s{upstream}" for given, upstream in needs.items()}
            new_stages.append(NewStage(f"s{position}", new, named))
        with self.world.database.write() as session:
            pipeline = pipelines.create(session, new_stages, name="p", org_id=self.world.org_id)
            stages = pipelines.stages_of(session, [pipeline], org_id=self.world.org_id)[pipeline.id]
        made: list[Life] = []
        for stage, needs, file_id in zip(stages, shape, files, strict=True):
            life = StageLife(stage.job.id, [file_id], needs=[made[position] for position in needs.values()])
            self.lives[life.id] = life
            made.append(life)
            if life.needs:
                life.status = "waiting"
            self._files_looked_at(life)

    @invariant()
    def database_equals_model(self) -> None:
        for life in self.lives.values():  # upstream before downstream
            if isinstance(life, StageLife) and life.status == "waiting":
                self._settle(life)
        super().database_equals_model()

    def _settle(self, life: StageLife) -> None:
        upstream = {need.status for need in life.needs}
        for end in ("failed", "cancelled"):
            if end in upstream:
                life.move(end)
                return
        if upstream != {"succeeded"}:
            return
        if self.file_states[life.files[0]] == "uploaded":
            life.move("validating_files")
        else:
            life.work["train"] = Work(next(self.tasks_made))
            life.move("queued")


def test_random_lives_of_pipelines(world: World):
    live_randomly(world, sequences=60, steps=25, machine=PipelineMachine)


@pytest.mark.faults(g=7)
@pytest.mark.timeout(3600)
def test_many_random_lives_of_pipelines(world: World):
    live_randomly(world, sequences=1000, steps=60, machine=PipelineMachine)
