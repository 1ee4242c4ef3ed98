"""The tables of what users see: keys, files, models, jobs with their events, deployments, votes."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from db import states
from db.tables import Base, BigKey, Owned, one_of, unique_where


class ApiKey(Owned, Base):
    """A bearer key: its public id and an HMAC of the whole; the key itself is nowhere."""

    __tablename__ = "api_keys"
    __table_args__ = (one_of("role", ("admin", "user")),)
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    role: Mapped[str]
    digest: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]


class Described:
    """What the owner of a file says of its rows; the rest is told by its name."""

    format: Mapped[str | None]
    column_map: Mapped[dict[str, Any] | None]
    max_invalid_fraction: Mapped[float | None]  # of the rows, which are then left out


class File(Owned, Described, Base):
    """A file; its bytes lie in the blob store under `sha256`, empty until they have come from `source`."""

    __tablename__ = "files"
    __table_args__ = (
        one_of("status", states.FILE_STATES),
        CheckConstraint("bytes >= 0", name="bytes"),
        Index(None, "org_id", "created_at", "id"),
        Index(None, "org_id", "sha256"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    status: Mapped[str]
    status_details: Mapped[str | None]
    rows: Mapped[int | None]
    report: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)  # too long for lists
    source: Mapped[str | None]
    expires_at: Mapped[float | None]
    created_at: Mapped[float]


class Upload(Owned, Described, Base):
    """A file that comes in parts. The parts of an upload that is no longer pending are gone."""

    __tablename__ = "uploads"
    __table_args__ = (
        one_of("status", states.UPLOAD_STATES),
        CheckConstraint("bytes > 0", name="bytes"),
        CheckConstraint("(status = 'completed') = (order_sha256 IS NOT NULL)", name="completed_has_order"),
        Index(None, "status", "expires_at"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    file_expires_after_s: Mapped[int | None]
    status: Mapped[str]
    order_sha256: Mapped[str | None]  # of the ids that it was completed with
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id", ondelete="SET NULL"))
    created_at: Mapped[float]
    expires_at: Mapped[float]


class UploadPart(Owned, Base):
    """Bytes of an upload, stored once however often they are sent."""

    __tablename__ = "upload_parts"
    __table_args__ = (UniqueConstraint("upload_id", "sha256"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    created_at: Mapped[float]


class Model(Owned, Base):
    """A model that can be served: a base, a merged result, or a checkpoint on its base, with its lineage."""

    __tablename__ = "models"
    __table_args__ = (
        one_of("kind", states.MODEL_KINDS),
        one_of("status", states.MODEL_STATES),
        CheckConstraint(
            "status <> 'ready' OR (path IS NOT NULL AND digest IS NOT NULL)", name="ready_has_path"
        ),
        unique_where("uq_models_live_id", "org_id", "id", where="deleted_at IS NULL"),
        unique_where("uq_models_public_id", "id", where="deleted_at IS NULL AND public"),
        unique_where("uq_models_job", "job_id", where="job_id IS NOT NULL AND kind = 'merged'"),
    )
    pk: Mapped[int] = mapped_column(BigKey, primary_key=True)
    id: Mapped[str]
    public: Mapped[bool]
    kind: Mapped[str]
    status: Mapped[str]
    source: Mapped[str]
    path: Mapped[str | None]
    digest: Mapped[str | None]
    adapter_path: Mapped[str | None]
    details: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    parent_id: Mapped[str | None]
    root_id: Mapped[str]
    job_id: Mapped[str | None]
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]

    @property
    def manifest_sha256(self) -> str | None:
        """Of a checkpoint: the sum of the manifest in `adapter_path` under which it was sealed."""
        return self.digest if self.kind == "checkpoint" else None


class Pipeline(Owned, Base):
    """Jobs that were submitted together because some start from what others make."""

    __tablename__ = "pipelines"
    __table_args__ = (Index(None, "org_id", "created_at", "id"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    created_at: Mapped[float]


class PipelineStage(Owned, Base):
    """A named stage and its job, which is an older pipeline's when it is `reused`.

    `needs` maps what the stage is given ("model", "reward_model") to the names of the stages that make it.
    """

    __tablename__ = "pipeline_stages"
    __table_args__ = (UniqueConstraint("pipeline_id", "name"), UniqueConstraint("pipeline_id", "position"))
    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipelines.id"))
    position: Mapped[int]
    name: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    reused: Mapped[bool]
    needs: Mapped[dict[str, Any]]


class Job(Owned, Base):
    """A fine-tuning job. Only `db.jobs` writes its state."""

    __tablename__ = "jobs"
    __table_args__ = (
        one_of("status", states.JOB_STATES),
        one_of("phase", states.JOB_PHASES),
        CheckConstraint(
            "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", name="finished"
        ),
        CheckConstraint("status <> 'succeeded' OR fine_tuned_model IS NOT NULL", name="succeeded_has_model"),
        CheckConstraint("(status = 'failed') = (error IS NOT NULL)", name="failed_has_error"),
        CheckConstraint(
            "model_pk IS NOT NULL OR status IN ('waiting', 'failed', 'cancelled')", name="has_model"
        ),
        one_of("on_oom", states.OOM_ANSWERS),
        CheckConstraint("priority BETWEEN -10 AND 10", name="priority"),
        CheckConstraint("(pipeline_id IS NULL) = (stage IS NULL)", name="stage_of_pipeline"),
        Index(None, "org_id", "created_at", "id"),
        Index(None, "org_id", "inputs_sha256"),
        Index(None, "status"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    phase: Mapped[str | None]
    model_id: Mapped[str]  # of a waiting job: what its model will be called
    model_pk: Mapped[int | None] = mapped_column(ForeignKey("models.pk"))
    training_file: Mapped[str]  # of several, the first
    validation_file: Mapped[str | None]
    method: Mapped[str]
    spec_version: Mapped[int]
    spec: Mapped[dict[str, Any]]
    resolved: Mapped[dict[str, Any] | None]
    resources: Mapped[dict[str, Any]]
    seed: Mapped[int]
    suffix: Mapped[str | None]
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    integrations: Mapped[list[Any] | None]
    progress: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    fine_tuned_model: Mapped[str | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    trained_attempt: Mapped[int | None]
    result_files: Mapped[list[Any] | None]
    pipeline_id: Mapped[str | None] = mapped_column(ForeignKey("pipelines.id"))
    stage: Mapped[str | None]
    inputs_sha256: Mapped[str | None]
    priority: Mapped[int]
    on_oom: Mapped[str | None]
    retry_of: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    pause_requested_at: Mapped[float | None]
    cancel_requested_at: Mapped[float | None]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


class MixedFile(Owned, Base):
    """A file of a job that trains on several; `Job.spec` says how much of each, and in which order."""

    __tablename__ = "mixed_files"
    __table_args__ = (Index(None, "file_id"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    file_id: Mapped[str] = mapped_column(primary_key=True)


class Event(Owned, Base):
    """What happened to a job, in order of `seq`."""

    __tablename__ = "events"
    __table_args__ = (
        one_of("level", ("info", "warn", "error")),
        one_of("type", ("message", "metrics")),
        Index(None, "job_id", "seq"),
    )
    seq: Mapped[int] = mapped_column(BigKey, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Checkpoint(Owned, Base):
    """A verified checkpoint that a trainer reported; `name` is its id as a model."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"), Index(None, "org_id", "name"))
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    path: Mapped[str]
    manifest_sha256: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Deployment(Owned, Base):
    """A model that should answer: `desired` is the user's word, `status` what the node's reconciler saw."""

    __tablename__ = "deployments"
    __table_args__ = (
        one_of("desired", ("running", "stopped")),
        one_of("status", states.DEPLOYMENT_STATES),
        CheckConstraint("status <> 'ready' OR address IS NOT NULL", name="ready_has_address"),
        unique_where("uq_deployments_live", "org_id", "model_id", where="desired = 'running'"),
        Index(None, "org_id", "created_at", "id"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    model_pk: Mapped[int] = mapped_column(ForeignKey("models.pk"))
    auto: Mapped[bool]
    desired: Mapped[str]
    status: Mapped[str]
    node: Mapped[str | None]
    address: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    restarts: Mapped[int]
    created_at: Mapped[float]
    last_used_at: Mapped[float]
    stopped_at: Mapped[float | None]


class IdempotentRequest(Owned, Base):
    """The answer given under an `Idempotency-Key`, to be given again."""

    __tablename__ = "idempotent_requests"
    __table_args__ = (UniqueConstraint("org_id", "key"),)
    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    key: Mapped[str]
    request_hash: Mapped[str]
    response: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Preview(Owned, Base):
    """What a model and a method see in a file: asked once, answered by a worker, kept until `expires_at`.

    `key` names all that decides the answer; `sha256` is the content of the file.
    """

    __tablename__ = "previews"
    __table_args__ = (
        one_of("kind", states.PREVIEW_KINDS),
        UniqueConstraint("org_id", "key"),
        Index(None, "org_id", "sha256"),
        Index(None, "expires_at"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    key: Mapped[str]
    sha256: Mapped[str]
    request: Mapped[dict[str, Any]]
    answer: Mapped[dict[str, Any] | None]
    created_at: Mapped[float]
    expires_at: Mapped[float]


class Vote(Owned, Base):
    """Two answers to one prompt (messages, the last one the user's), and which one was preferred."""

    __tablename__ = "votes"
    __table_args__ = (Index(None, "org_id", "created_at", "id"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    prompt: Mapped[list[Any]]
    chosen_model: Mapped[str]
    chosen: Mapped[str]
    rejected_model: Mapped[str]
    rejected: Mapped[str]
    created_at: Mapped[float]
