"""Pipelines: jobs submitted together, of which some start from what others make."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from sqlalchemy.orm import Session

from db import adapters, job_files, jobs, registry, stages
from db.errors import Conflict, NotFound
from db.ids import new_id
from db.models import Job, Model, Pipeline, PipelineStage
from db.new_jobs import NewJob, Place
from db.pages import Page, paginate
from db.scope import scoped
from db.session import clock
from db.states import JOB_TERMINAL

_REWARD_METHOD = "reward"
# Of stages that are not all over, the liveliest tells; of those that are, the worst.
_LIVELIEST = ("running", "queued", "validating_files", "paused", "waiting")
_WORST = ("failed", "cancelled", "succeeded")


@dataclass(frozen=True)
class NewStage:
    """A stage to be made. `needs` maps "model" or a hyperparameter to the stage that makes its value."""

    name: str
    job: NewJob
    needs: dict[str, str]

    def path_of(self, field: str) -> str:
        """Where in the stage of the request a need is written."""
        if field == "model":
            return "model.stage"
        return f"method.{self.job.method}.hyperparameters.{field}.stage"


class Stage(NamedTuple):
    """A stage as it is: its row, and its job, which may be of an older pipeline."""

    row: PipelineStage
    job: Job


class Made(NamedTuple):
    """A stage whose job is there, and the base at the start of its lineage."""

    job: Job
    root_id: str


def create(session: Session, new_stages: Sequence[NewStage], *, name: str, org_id: str) -> Pipeline:
    """Accept a pipeline: its row, and for every stage a finished job with the same inputs, or else a new one.

    Raises `Conflict`, whose `param` is the path in the request, for what can never run.
    """
    order = _arrange(new_stages)
    pipeline = Pipeline(id=new_id("pipe-"), org_id=org_id, name=name, created_at=clock(session))
    session.add(pipeline)
    session.flush()
    job_ids = sorted(new_id("ftjob-") for _ in new_stages)  # rising from upstream to downstream
    made: dict[str, Made] = {}
    for position, job_id in zip(order, job_ids, strict=True):
        stage = new_stages[position]
        with _located(position, stage.job):
            made[stage.name] = _make(session, pipeline, stage, made=made, job_id=job_id)
        job = made[stage.name].job
        row = PipelineStage(
            org_id=org_id,
            pipeline_id=pipeline.id,
            position=position,
            name=stage.name,
            job_id=job.id,
            reused=job.pipeline_id != pipeline.id,
            needs=stage.needs,
        )
        session.add(row)
    session.flush()
    return pipeline


def get(session: Session, pipeline_id: str, *, org_id: str) -> Pipeline:
    """Raises `NotFound`."""
    pipeline = session.scalar(scoped(Pipeline, org_id).where(Pipeline.id == pipeline_id))
    if pipeline is None:
        raise NotFound("pipeline", pipeline_id)
    return pipeline


def list_page(session: Session, *, org_id: str, after: str | None, limit: int) -> Page:
    """Pipelines of a tenant, newest first."""
    return paginate(
        session,
        scoped(Pipeline, org_id),
        order_by=(Pipeline.created_at, Pipeline.id),
        id_column=Pipeline.id,
        after=after,
        limit=limit,
    )


def stages_of(session: Session, pipelines: Sequence[Pipeline], *, org_id: str) -> dict[str, list[Stage]]:
    """The stages of each of these pipelines by its id, in the order in which they were given."""
    found: dict[str, list[Stage]] = {pipeline.id: [] for pipeline in pipelines}
    rows = session.execute(
        scoped(PipelineStage, org_id)
        .add_columns(Job)
        .join(Job, Job.id == PipelineStage.job_id)
        .where(PipelineStage.pipeline_id.in_(found))
        .order_by(PipelineStage.position)
    )
    for row, job in rows:
        found[row.pipeline_id].append(Stage(row, job))
    return found


def status_of(of_pipeline: Sequence[Stage]) -> str:
    """The status of a pipeline in the words of its jobs."""
    statuses = {stage.job.status for stage in of_pipeline}
    telling = _WORST if statuses <= JOB_TERMINAL else _LIVELIEST
    return next(status for status in telling if status in statuses)


def finished_at(pipeline: Pipeline, of_pipeline: Sequence[Stage]) -> float | None:
    """When the last stage ended; at once, if all of them were reused."""
    ends = [stage.job.finished_at for stage in of_pipeline]
    if None in ends:
        return None
    return max(pipeline.created_at, *(end for end in ends if end is not None))


def cancel(session: Session, pipeline_id: str, *, org_id: str) -> Pipeline:
    """Cancel every stage that is not over. Raises `NotFound`, `Conflict` when all are."""
    pipeline = get(session, pipeline_id, org_id=org_id)
    own = [stage.job.id for stage in stages_of(session, [pipeline], org_id=org_id)[pipeline.id]]
    unfinished = [job for job in jobs.lock_all(session, own) if job.status not in JOB_TERMINAL]
    if not unfinished:
        raise Conflict("pipeline_not_cancellable", f"Every stage of '{pipeline_id}' is over.")
    for job in unfinished:
        if job.status not in JOB_TERMINAL:  # the end of another one may have been the end of this one
            jobs.request_cancel(session, job.id, org_id=org_id)
    return pipeline


def _make(
    session: Session, pipeline: Pipeline, stage: NewStage, *, made: dict[str, Made], job_id: str
) -> Made:
    """The job of a stage whose upstream stages are made."""
    org_id = pipeline.org_id
    new = stage.job
    upstream = {field: made[name] for field, name in stage.needs.items()}
    for field, source in upstream.items():
        output = source.job.fine_tuned_model or registry.name_result(
            session, source.job, root_id=source.root_id
        )
        if field == "model":
            new = replace(new, model=output)
        else:
            new = replace(new, spec=stages.set_parameter(new.spec, field, output))
    awaited = frozenset(field for field, source in upstream.items() if source.job.status != "succeeded")
    job_files.hold(session, new, org_id=org_id)
    if "model" in awaited:
        root_id = upstream["model"].root_id
    else:
        model = registry.get_trainable(session, new.model, org_id=org_id)
        root_id = model.root_id
        new = adapters.settle(session, new, base=model, org_id=org_id)
        finished = None if awaited else _find_finished(session, new, model=model, org_id=org_id)
        if finished is not None:
            return Made(finished, root_id)
    place = Place(
        pipeline_id=pipeline.id,
        stage=stage.name,
        job_id=job_id,
        waits_for=tuple(dict.fromkeys(stage.needs[field] for field in stage.needs if field in awaited)),
        awaits=awaited,
    )
    return Made(jobs.create(session, new, org_id=org_id, place=place), root_id)


def _find_finished(session: Session, new: NewJob, *, model: Model, org_id: str) -> Job | None:
    inputs = stages.digest_inputs(session, new, model=model, org_id=org_id)
    return None if inputs is None else stages.find_finished(session, inputs, org_id=org_id)


@contextmanager
def _located(position: int, new: NewJob) -> Iterator[None]:
    """Refuse what is wrong with a stage as a mistake at its place in the request."""
    try:
        yield
    except NotFound as error:
        param = "model" if error.kind == "model" else job_files.param_of(new, error.subject_id) or "model"
        code = "model_not_found" if error.kind == "model" else "not_found"
        raise Conflict(code, str(error), param=f"stages.{position}.{param}") from error
    except Conflict as error:
        path = f"stages.{position}" + (f".{error.param}" if error.param else "")
        raise Conflict(error.code, str(error), param=path) from error


def _arrange(new_stages: Sequence[NewStage]) -> list[int]:
    """The positions of the stages, upstream first. Raises `Conflict` where they do not fit together."""
    positions: dict[str, int] = {}
    for position, stage in enumerate(new_stages):
        if positions.setdefault(stage.name, position) != position:
            message = f"There are two stages with the name '{stage.name}'."
            raise Conflict("invalid_value", message, param=f"stages.{position}.name")
    for position, stage in enumerate(new_stages):
        for field, name in stage.needs.items():
            path = f"stages.{position}.{stage.path_of(field)}"
            if name not in positions:
                raise Conflict("unknown_stage", f"There is no stage with the name '{name}'.", param=path)
            _check_pairing(new_stages[positions[name]], field=field, path=path)
    graph = {
        position: [positions[name] for name in stage.needs.values()]
        for position, stage in enumerate(new_stages)
    }
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = set(error.args[1])
        position = min(circle)
        stage = new_stages[position]
        field = next(field for field, name in stage.needs.items() if positions[name] in circle)
        message = f"The stage '{stage.name}' would start from what comes of itself."
        path = f"stages.{position}.{stage.path_of(field)}"
        raise Conflict("pipeline_cycle", message, param=path) from error


def _check_pairing(upstream: NewStage, *, field: str, path: str) -> None:
    judges = upstream.job.method == _REWARD_METHOD
    if field == "model" and judges:
        message = f"'{upstream.name}' makes a reward model, which cannot be the start of a training."
        raise Conflict("model_not_trainable", message, param=path)
    if field != "model" and not judges:
        message = f"'{upstream.name}' does not make a reward model; its method is {upstream.job.method}."
        raise Conflict("not_a_reward_model", message, param=path)
