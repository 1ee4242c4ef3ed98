"""Bodies of requests and answers about jobs and what they leave. Times are Unix seconds."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from api.schemas.common import Body, Id
from api.schemas.diagnosis import Diagnosis
from trainers.specs import Resources, Share
from trainers.specs.mixture import MAX_FILES

JobStatus = Literal[
    "waiting", "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class WandbSettings(Body):
    """Where a run would be shown in Weights & Biases."""

    project: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    entity: Annotated[str, StringConstraints(max_length=256)] | None = None
    tags: list[Annotated[str, StringConstraints(max_length=64)]] | None = Field(default=None, max_length=50)


class Integration(Body):
    """A third-party integration of a job."""

    type: Literal["wandb"]
    wandb: WandbSettings


class TrainingFile(Body):
    """One of several training files. Either all have a weight, or all have epochs, or none has any."""

    file: Id = Field(description="Id of an uploaded file with purpose `fine-tune`.")
    weight: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None,
        description="Beside those of the others: the mixture has as many rows as the files together.",
    )
    epochs: Annotated[float, Field(gt=0, le=100)] | None = Field(
        default=None, description="Passes over this file for each epoch of the job: 2 shows its rows twice."
    )

    @property
    def share(self) -> Share:
        """How much of it is taken."""
        return Share.model_validate(self.model_dump(include={"weight", "epochs"}, exclude_none=True))


class Training(Body):
    """What is trained, on what, and how."""

    model: Id = Field(description="Id of the base or fine-tuned model to start from.")
    training_file: Id | None = Field(
        default=None, description="Id of an uploaded file with purpose `fine-tune`."
    )
    training_files: Annotated[list[TrainingFile], Field(min_length=1, max_length=MAX_FILES)] | None = Field(
        default=None, description="In place of `training_file`: several, and how much of each is taken."
    )
    validation_file: Id | None = Field(default=None, description="Id of a file to measure the loss on.")
    suffix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = Field(
        default=None, description="Goes into the name of the fine-tuned model."
    )
    seed: int | None = Field(
        default=None, ge=0, le=2**31 - 1, strict=True, description="Chosen and echoed when absent."
    )
    method: dict[str, Any] | None = Field(
        default=None,
        description="How to train: its `type`, and under that name its hyperparameters.",
        examples=[{"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}],
    )
    resources: Resources | None = Field(default=None, description="Processes that train side by side.")
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        default=None, max_length=16, description="Notes of your own, at most 16."
    )
    on_oom: Literal["halve_batch"] | None = Field(
        default=None,
        description="`halve_batch`: instead of failing for want of memory, go on from the last checkpoint "
        "with half of `micro_batch_size` and the same batch, down to one row at once.",
    )
    priority: int = Field(
        default=0,
        ge=-10,
        le=10,
        strict=True,
        description="Of a tenant's waiting jobs, those with a higher one are started first.",
    )


class CreateJob(Training):
    """A fine-tuning job to be run."""

    hyperparameters: dict[str, Any] | None = Field(
        default=None, description="Older place of `method.supervised.hyperparameters`."
    )
    integrations: list[Integration] | None = Field(
        default=None, max_length=8, description="Kept with the job and echoed."
    )


class RetryJob(Body):
    """What is to be different when a job is tried again."""

    hyperparameters: dict[str, Any] | None = Field(
        default=None,
        description="Replace those of the job; the new job then starts anew. Null stands for the default. "
        "Without any it goes on from the last checkpoint.",
    )


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str | None
    param: str | None = None


class JobObject(BaseModel):
    """A fine-tuning job. The keys after `shared_with_openai` are additions of this service."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None = Field(description="Only while the job runs.")
    model: str
    fine_tuned_model: str | None = Field(description="The result; a model that can be deployed.")
    organization_id: str
    status: JobStatus
    training_file: str = Field(description="Of several, the first.")
    training_files: list[TrainingFile] | None = Field(description="Where there are several.")
    validation_file: str | None
    result_files: list[str] = Field(
        description="Once training is over: the metrics of every step as CSV, and evaluation.json if any."
    )
    trained_tokens: int | None = Field(description="Once the job is over.")
    seed: int
    hyperparameters: dict[str, Any] | None = Field(
        description='As given; every "auto" is replaced by what was chosen once the job runs.'
    )
    method: dict[str, Any]
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    error: JobError | None
    user_provided_suffix: str | None
    usage_metrics: None = None
    shared_with_openai: bool = False
    ignored: dict[str, str] = Field(description="Hyperparameters without effect here, and why.")
    pipeline_id: str | None = Field(description="The pipeline it belongs to.")
    stage: str | None = Field(description="Its name there; it is `waiting` until what it needs is made.")
    phase: str | None = Field(description="What a running job is busy with.")
    progress: dict[str, Any] | None = Field(
        description="step, total_steps, percent, tokens_per_s, eta_seconds"
    )
    resources: dict[str, Any]
    priority: int
    on_oom: str | None
    retry_of: str | None = Field(description="The job that this one tries again.")
    queue_position: int | None = Field(
        default=None,
        description="Jobs that will be started earlier, of other tenants too, as if none that runs ended "
        "before. Only on single jobs that wait.",
    )
    blocked_by: list[dict[str, Any]] | None = Field(
        default=None,
        description="Why it has not started, each with its `reason`: `stage`, `file`, `earlier_jobs`, "
        "`devices`, `pause_after_failure`, `paused`, `worker`; or why no machine can take it: "
        "`too_few_devices`, `too_few_nodes`, `draining`, `quarantined`, `disk`. Only on single jobs that "
        "wait.",
    )
    expected_start_at: int | None = Field(
        default=None,
        description="When devices enough will be free for it and the jobs before it, as far as those that "
        "run tell. Only on single jobs that wait; null where nobody can know.",
    )
    diagnosis: Diagnosis | None = Field(
        default=None, description="Why it failed, and what could be done. Only on single jobs that failed."
    )


class EventObject(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]


class Curve(BaseModel):
    """One number over the steps of a job."""

    steps: list[int] = Field(description="Rising.")
    values: list[float]


class CurvesObject(BaseModel):
    """Every number that training reported of its steps."""

    object: Literal["fine_tuning.job.curves"] = "fine_tuning.job.curves"
    job_id: str
    last_step: int | None = Field(description="Null before the first step was reported.")
    total_steps: int | None
    series: dict[str, Curve] = Field(
        description="By name: `train_loss`, `valid_loss`, `learning_rate`, and what the method measures."
    )


class CheckpointObject(BaseModel):
    """A state of training that was saved."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]


class ArtifactObject(BaseModel):
    """A file that training left."""

    id: str = Field(description="The name; it may hold slashes.")
    object: Literal["fine_tuning.job.artifact"] = "fine_tuning.job.artifact"
    name: str
    bytes: int
    kind: Literal["adapter", "model", "checkpoint", "tokenizer", "metrics", "tensorboard", "spec", "log"]
    created_at: int


class JobList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool


class EventList(BaseModel):
    """A page of events."""

    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class CheckpointList(BaseModel):
    """A page of checkpoints."""

    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ArtifactList(BaseModel):
    """All artifacts of a job."""

    object: Literal["list"] = "list"
    data: list[ArtifactObject]
    has_more: bool
