"""Bodies of requests and answers about pipelines. Times are Unix seconds."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, StringConstraints, WithJsonSchema

from api.schemas.common import Body
from api.schemas.jobs import JobError, JobStatus, Training

MAX_STAGES = 16
_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


@dataclass(frozen=True)
class StageRef:
    """What another stage makes."""

    stage: str


def read_reference(value: Any) -> StageRef | None:
    """`{"stage": NAME}` as a reference; None for anything else."""
    if isinstance(value, dict) and set(value) == {"stage"} and isinstance(value["stage"], str):
        return StageRef(value["stage"])
    return None


def _read_model(value: Any) -> str | StageRef:
    reference = read_reference(value)
    if reference is not None:
        return reference
    if isinstance(value, str) and 1 <= len(value) <= 256:
        return value
    raise ValueError('it must be the id of a model, or {"stage": NAME} for what another stage makes')


# Not a union of pydantic's: it would put the name of a branch into the path of what is wrong.
ModelOrStage = Annotated[
    Any,
    PlainValidator(_read_model),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": 256},
                {
                    "type": "object",
                    "properties": {"stage": {"type": "string"}},
                    "required": ["stage"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class CreateStage(Training):
    """A stage of a pipeline, which will be a fine-tuning job."""

    name: Annotated[str, StringConstraints(pattern=_NAME_PATTERN)] = Field(
        description="By which other stages name it."
    )
    model: ModelOrStage = Field(
        description='Id of the model to start from, or `{"stage": NAME}` for what another stage makes. '
        "So may the hyperparameter `reward_model`."
    )


class CreatePipeline(Body):
    """Stages to be run in the order in which they need each other."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    stages: list[CreateStage] = Field(min_length=1, max_length=MAX_STAGES)


class StageObject(BaseModel):
    """A stage and its job."""

    name: str
    status: JobStatus
    job_id: str
    reused: bool = Field(description="The job is an older pipeline's that had the same inputs.")
    model: str = Field(description="What it starts from; while it waits, what that will be called.")
    fine_tuned_model: str | None
    error: JobError | None


class PipelineObject(BaseModel):
    """Jobs that were submitted together."""

    id: str
    object: Literal["pipeline"] = "pipeline"
    name: str
    status: JobStatus = Field(
        description="That of the liveliest stage until all are over; then `succeeded` if all of them are."
    )
    created_at: int
    finished_at: int | None
    stages: list[StageObject]


class PipelineList(BaseModel):
    """A page of pipelines."""

    object: Literal["list"] = "list"
    data: list[PipelineObject]
    has_more: bool
