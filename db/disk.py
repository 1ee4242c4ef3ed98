"""How much of the disk a job will need, as far as it can be told before it runs."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.models import Job, Model

_TENSORS_A_WEIGHT = 3  # itself and the two moments of the optimizer


def estimate_checkpoints_bytes(session: Session, job_ids: Collection[str]) -> dict[str, int]:
    """The sizes of checkpoints of jobs that train all weights; 0 for adapters, which are small."""
    rows = session.execute(
        select(Job.id, Job.spec, Model.details)
        .outerjoin(Model, Model.pk == Job.model_pk)
        .where(Job.id.in_(job_ids))
    )
    return {job_id: _estimate(spec["method"], details or {}) for job_id, spec, details in rows}


def _estimate(method: dict[str, Any], details: dict[str, Any]) -> int:
    if method.get(method["type"], {}).get("hyperparameters", {}).get("use_peft", True):
        return 0
    return _TENSORS_A_WEIGHT * int(details.get("bytes") or 0)
