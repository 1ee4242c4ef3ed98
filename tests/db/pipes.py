"""Pipelines in a world of the database suite, and hands that move their stages on."""

from db import jobs, pipelines, tasks
from db.models import File, Job, Pipeline
from db.pipelines import NewStage, Stage
from db.tasks import Lease
from tests.db.world import ERROR, World


class Pipe:
    """A pipeline in a world, and hands that move its stages on."""

    def __init__(self, world: World, *new_stages: NewStage) -> None:
        self.world = world
        with world.database.write() as session:
            self.row = pipelines.create(session, new_stages, name="medical", org_id=world.org_id)

    def stages(self) -> dict[str, Stage]:
        with self.world.database.read() as session:
            found = pipelines.stages_of(session, [self.row], org_id=self.world.org_id)[self.row.id]
        return {stage.row.name: stage for stage in found}

    def job(self, name: str) -> Job:
        return self.stages()[name].job

    def statuses(self) -> dict[str, str]:
        return {name: stage.job.status for name, stage in self.stages().items()}

    def status(self) -> str:
        return pipelines.status_of(list(self.stages().values()))

    def start(self, name: str) -> Lease:
        lease = self.world.take()
        assert lease.subject_id == self.job(name).id
        return lease

    def to_merging(self, name: str) -> Lease:
        self.world.train(self.start(name))
        return self.world.take("cpu")

    def finish(self, name: str) -> Job:
        return self.world.merge(self.to_merging(name))

    def fail(self, lease: Lease) -> None:
        with tasks.fenced(self.world.database, lease) as session:
            jobs.fail(session, lease, error=ERROR)

    def cancel(self) -> Pipeline:
        with self.world.database.write() as session:
            return pipelines.cancel(session, self.row.id, org_id=self.world.org_id)


def upload_unchecked(world: World) -> File:
    """A file whose check is on its way, out of the way of those that claim merges."""
    file = world.upload()
    with world.database.write() as session:
        tasks.close_waiting(session, kind="validate", subject_id=file.id)
    return file
