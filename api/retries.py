"""/v1/fine_tuning/jobs/{id}/retry: what did not succeed, again."""

from dataclasses import replace
from typing import Any

from fastapi import APIRouter, BackgroundTasks
from sqlalchemy.orm import Session

from api import single_job
from api.auth import CallerDep
from api.deps import SettingsDep
from api.jobs import describe_job
from api.once import OnceDep
from api.schemas.jobs import JobObject, RetryJob, Training
from db import job_files, jobs, retries
from db.models import Job
from db.new_jobs import NewJob
from trainers.specs import parse_method
from trainers.specs.names import ALIASES, DTYPE_FLAGS
from workers.dispatch import ring

router = APIRouter(prefix="/fine_tuning/jobs", tags=["Fine-tuning"])


@router.post("/{job_id}/retry", summary="Retry fine-tuning job")
def retry_job(
    job_id: str,
    caller: CallerDep,
    once: OnceDep,
    settings: SettingsDep,
    background: BackgroundTasks,
    body: RetryJob | None = None,
) -> JobObject:
    """Try a failed or cancelled job again, as a new one.

    It goes on from the last checkpoint of the old one, unless other hyperparameters are given.
    """
    changes = (body.hyperparameters if body else None) or {}

    def make(session: Session) -> dict[str, Any]:
        old = jobs.get(session, job_id, org_id=caller.org_id)
        job = retries.retry(session, old, _describe_again(old, changes))
        background.add_task(ring, "train")
        background.add_task(ring, "cpu")
        return single_job.show(session, job, settings=settings).model_dump(mode="json")

    asked = (f"POST /v1/fine_tuning/jobs/{job_id}/retry", changes)
    return JobObject.model_validate(once.answer(make, request=asked))


def _describe_again(old: Job, changes: dict[str, Any]) -> NewJob:
    """The job once more, with some hyperparameters changed. Raises SpecError."""
    mixture = job_files.mixture_of(old)
    method = old.spec["method"]
    if changes:
        inner = method[old.method]
        replaced = {"dtype" if name in DTYPE_FLAGS else ALIASES.get(name, name) for name in changes}
        kept = {name: value for name, value in inner["hyperparameters"].items() if name not in replaced}
        hyperparameters = kept | changes
        method = method | {old.method: inner | {"hyperparameters": hyperparameters}}
    asked = Training.model_validate(
        {
            "model": old.model_id,
            "training_file": None if mixture else old.training_file,
            "training_files": mixture or None,
            "validation_file": old.validation_file,
            "suffix": old.suffix,
            "method": method,
            "resources": old.resources,
            "metadata": old.metadata_,
            "on_oom": old.on_oom,
            "priority": old.priority,
        }
    )
    parsed = parse_method(asked.method, None)
    seed = old.seed if parsed.job_fields.seed is None else parsed.job_fields.seed
    new = describe_job(asked, parsed, model=old.model_id, seed=seed, integrations=old.integrations)
    return replace(new, spec=new.spec | {"ignored": old.spec.get("ignored", {}) | new.spec["ignored"]})
