"""How much of the disk a job will need, as far as it can be told before it runs."""

from sqlalchemy.orm import Session

from db.models import Job, Model

_TENSORS_A_WEIGHT = 3  # itself and the two moments of the optimizer


def estimate_checkpoint_bytes(session: Session, job_id: str) -> int:
    """The size of a checkpoint of a job that trains all weights; 0 for adapters, which are small."""
    job = session.get(Job, job_id)
    if job is None or job.model_pk is None:
        return 0
    method = job.spec["method"]
    if method.get(method["type"], {}).get("hyperparameters", {}).get("use_peft", True):
        return 0
    details = session.get_one(Model, job.model_pk).details or {}
    return _TENSORS_A_WEIGHT * int(details.get("bytes") or 0)
