"""What a submission asks for, before it is a job."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NewJob:
    """A job to be made, validated by the caller."""

    model: str
    training_file: str
    validation_file: str | None
    method: str
    spec_version: int
    spec: dict[str, Any]
    resources: dict[str, Any]
    seed: int
    suffix: str | None = None
    metadata: dict[str, Any] | None = None
    integrations: list[Any] | None = None
    priority: int = 0
    on_oom: str | None = None
    retry_of: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a job stands in a pipeline.

    It waits until the stages `waits_for` have succeeded, which make what `awaits` names: "model", or the
    hyperparameters that are one.
    """

    pipeline_id: str
    stage: str
    job_id: str
    waits_for: tuple[str, ...]
    awaits: frozenset[str]
