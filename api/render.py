"""Rows as the objects that clients read."""

from collections.abc import Sequence
from typing import Any

from api.schemas.deployments import DeploymentObject
from api.schemas.files import FileObject
from api.schemas.jobs import CheckpointObject, EventObject, JobObject
from api.schemas.models import LineageObject, ModelObject
from api.schemas.pipelines import PipelineObject
from api.schemas.uploads import UploadObject, UploadPartObject
from api.schemas.votes import VoteObject
from db import job_files, pipelines
from db.keys import Caller
from db.models import ApiKey, Checkpoint, Deployment, Event, File, Job, Model, Pipeline, UploadPart, Vote
from db.pipelines import Stage
from db.uploads import Seen
from trainers.specs import write_method

_CHECKPOINT_METRICS = (
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


def file_object(file: File) -> FileObject:
    """A file."""
    return FileObject.model_validate(
        {
            "id": file.id,
            "bytes": file.bytes,
            "created_at": int(file.created_at),
            "expires_at": None if file.expires_at is None else int(file.expires_at),
            "filename": file.filename,
            "purpose": file.purpose,
            "status": file.status,
            "status_details": file.status_details,
            "sha256": file.sha256,
            "rows": file.rows,
            "format": file.format,
            "column_map": file.column_map,
            "max_invalid_fraction": file.max_invalid_fraction or 0.0,
            "source": file.source,
        }
    )


def upload_object(seen: Seen) -> UploadObject:
    """An upload with what has come of it."""
    upload = seen.upload
    return UploadObject.model_validate(
        {
            "id": upload.id,
            "bytes": upload.bytes,
            "created_at": int(upload.created_at),
            "expires_at": int(upload.expires_at),
            "filename": upload.filename,
            "purpose": upload.purpose,
            "format": upload.format,
            "column_map": upload.column_map,
            "max_invalid_fraction": upload.max_invalid_fraction or 0.0,
            "status": seen.status,
            "file": file_object(seen.file) if seen.file else None,
            "parts": [upload_part_object(part) for part in seen.parts],
        }
    )


def upload_part_object(part: UploadPart) -> UploadPartObject:
    """A part of an upload."""
    return UploadPartObject.model_validate(
        {
            "id": part.id,
            "created_at": int(part.created_at),
            "upload_id": part.upload_id,
            "bytes": part.bytes,
            "sha256": part.sha256,
        }
    )


def job_object(job: Job, **alone: Any) -> JobObject:
    """A job. What it was given becomes what it uses once that is known. `alone` is what `single_job` adds."""
    method = write_method(job.method, job.resolved) if job.resolved else job.spec["method"]
    return JobObject.model_validate(
        {
            "id": job.id,
            "created_at": int(job.created_at),
            "finished_at": None if job.finished_at is None else int(job.finished_at),
            "estimated_finish": _estimated_finish(job),
            "model": job.model_id,
            "fine_tuned_model": job.fine_tuned_model,
            "organization_id": job.org_id,
            "status": job.status,
            "training_file": job.training_file,
            "training_files": job_files.mixture_of(job) or None,
            "validation_file": job.validation_file,
            "result_files": job.result_files or [],
            "trained_tokens": job.trained_tokens if job.finished_at is not None else None,
            "seed": job.seed,
            "hyperparameters": method.get("supervised", {}).get("hyperparameters"),
            "method": method,
            "integrations": job.integrations or [],
            "metadata": job.metadata_,
            "error": job.error,
            "user_provided_suffix": job.suffix,
            "ignored": job.spec.get("ignored", {}),
            "pipeline_id": job.pipeline_id,
            "stage": job.stage,
            "phase": job.phase,
            "progress": job.progress,
            "resources": job.resources,
            "priority": job.priority,
            "on_oom": job.on_oom,
            "retry_of": job.retry_of,
        }
        | alone
    )


def _estimated_finish(job: Job) -> int | None:
    progress = job.progress or {}
    eta_s = progress.get("eta_seconds")
    if job.status != "running" or eta_s is None:
        return None
    return int(progress["updated_at"] + eta_s)


def event_object(event: Event) -> EventObject:
    """An event of a job."""
    return EventObject.model_validate(
        {
            "id": event.id,
            "created_at": int(event.created_at),
            "level": event.level,
            "type": event.type,
            "message": event.message,
            "data": event.data,
        }
    )


def checkpoint_object(checkpoint: Checkpoint) -> CheckpointObject:
    """A checkpoint."""
    known = dict.fromkeys(_CHECKPOINT_METRICS) | checkpoint.metrics
    return CheckpointObject(
        id=checkpoint.id,
        created_at=int(checkpoint.created_at),
        fine_tuning_job_id=checkpoint.job_id,
        fine_tuned_model_checkpoint=checkpoint.name,
        step_number=checkpoint.step,
        metrics={"step": checkpoint.step, **known},
    )


def pipeline_object(pipeline: Pipeline, stages: Sequence[Stage]) -> PipelineObject:
    """A pipeline with its stages."""
    finished_at = pipelines.finished_at(pipeline, stages)
    return PipelineObject.model_validate(
        {
            "id": pipeline.id,
            "name": pipeline.name,
            "status": pipelines.status_of(stages),
            "created_at": int(pipeline.created_at),
            "finished_at": None if finished_at is None else int(finished_at),
            "stages": [_stage(stage) for stage in stages],
        }
    )


def _stage(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.row.name,
        "status": stage.job.status,
        "job_id": stage.job.id,
        "reused": stage.row.reused,
        "model": stage.job.model_id,
        "fine_tuned_model": stage.job.fine_tuned_model,
        "error": stage.job.error,
    }


def model_object(model: Model, caller: Caller, **alone: Any) -> ModelObject:
    """A model as `caller` may see it. `alone` is what lists leave out."""
    return ModelObject.model_validate(
        {
            "id": model.id,
            "created": int(model.created_at),
            "owned_by": model.org_id,
            "status": model.status,
            "kind": model.kind,
            "parent": model.parent_id,
            "root": model.root_id,
            "digest": model.digest,
            "max_model_len": (model.details or {}).get("context_length"),
            "details": model.details,
            "error": model.error,
            "source": model.source if caller.role == "admin" else None,
            "job_id": model.job_id,
        }
        | alone
    )


def key_fields(key: ApiKey) -> dict[str, Any]:
    """What may be told of a key."""
    times = {name: getattr(key, name) for name in ("expires_at", "last_used_at", "revoked_at")}
    return {
        "id": key.id,
        "name": key.name,
        "role": key.role,
        "created_at": int(key.created_at),
        **{name: None if value is None else int(value) for name, value in times.items()},
    }


def lineage(way: Sequence[tuple[Model, Job | None]]) -> list[LineageObject]:
    """The way to a model."""
    return [
        LineageObject.model_validate(
            {
                "model": model.id,
                "kind": model.kind,
                "job_id": model.job_id,
                "method": job.method if job else None,
                "deleted": model.deleted_at is not None,
            }
        )
        for model, job in way
    ]


def deployment_object(deployment: Deployment, caller: Caller) -> DeploymentObject:
    """A deployment as `caller` may see it."""
    return DeploymentObject.model_validate(
        {
            "id": deployment.id,
            "model": deployment.model_id,
            "status": deployment.status,
            "auto": deployment.auto,
            "created_at": int(deployment.created_at),
            "error": deployment.error,
            "address": deployment.address if caller.role == "admin" else None,
        }
    )


def vote_object(vote: Vote) -> VoteObject:
    """A vote."""
    return VoteObject.model_validate(
        {
            "id": vote.id,
            "created_at": int(vote.created_at),
            "prompt": vote.prompt,
            "chosen": {"model": vote.chosen_model, "content": vote.chosen},
            "rejected": {"model": vote.rejected_model, "content": vote.rejected},
        }
    )


def page(objects: Sequence[Any], *, has_more: bool) -> dict[str, Any]:
    """The envelope of a list; `first_id` and `last_id` are kept only where the schema names them."""
    return {
        "data": objects,
        "first_id": objects[0].id if objects else None,
        "last_id": objects[-1].id if objects else None,
        "has_more": has_more,
    }
