"""Checkpoints that trainers sealed and reported."""

from pathlib import Path
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from db import registry
from db.ids import new_id
from db.models import Checkpoint, Job
from db.pages import Page, paginate
from db.scope import scoped
from db.session import clock


def record(
    session: Session, job: Job, *, step: int, path: Path, manifest_sha256: str, metrics: dict[str, Any]
) -> None:
    """Record a sealed checkpoint, which is a model too. A step reached again replaces the older one."""
    name = f"{registry.name_result(session, job)}:ckpt-step-{step}"
    session.execute(delete(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == step))
    session.add(
        Checkpoint(
            id=new_id("ftckpt_"),
            name=name,
            org_id=job.org_id,
            job_id=job.id,
            step=step,
            path=str(path),
            manifest_sha256=manifest_sha256,
            metrics=metrics,
            created_at=clock(session),
        )
    )
    session.flush()
    registry.register_checkpoint(session, job, name=name, path=path, digest=manifest_sha256)


def forget_missing(session: Session, job: Job) -> None:
    """Drop the rows of checkpoints that the trainer has rotated away."""
    for row in session.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id)):
        if not Path(row.path).is_dir():
            registry.forget_checkpoint(session, job, name=row.name)
            session.delete(row)
    session.flush()


def list_page(session: Session, *, org_id: str, job_id: str, after: str | None, limit: int) -> Page:
    """Checkpoints of a job, newest first."""
    return paginate(
        session,
        scoped(Checkpoint, org_id).where(Checkpoint.job_id == job_id),
        order_by=(Checkpoint.step,),
        id_column=Checkpoint.id,
        after=after,
        limit=limit,
    )
