"""Uploaded files: recorded with their bytes, checked by a worker, deleted when nothing needs them."""

from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db import blobs, job_files, previews, tasks
from db.blobs import BlobWriter
from db.errors import Conflict, NotFound
from db.ids import new_id
from db.models import File, Job
from db.pages import Page, paginate
from db.scope import scoped
from db.session import Database, clock, lock_digest
from db.sources import HubSource
from db.states import JOB_TERMINAL

RESULTS_PURPOSE = "fine-tune-results"


def create(
    session: Session,
    writer: BlobWriter,
    *,
    org_id: str,
    filename: str,
    purpose: str,
    expires_after_s: int | None = None,
    format: str | None = None,
    column_map: dict[str, str] | None = None,
    max_invalid_fraction: float | None = None,
) -> File:
    """Record a file with its synced bytes, and queue its check; only training files need one."""
    lock_digest(session, writer.sha256)
    writer.keep()
    checked = purpose == "fine-tune"
    now = clock(session)
    file = File(
        id=new_id("file-"),
        org_id=org_id,
        filename=filename,
        purpose=purpose,
        bytes=writer.size_bytes,
        sha256=writer.sha256,
        status="uploaded" if checked else "processed",
        format=format,
        column_map=column_map,
        max_invalid_fraction=max_invalid_fraction,
        created_at=now,
        expires_at=None if expires_after_s is None else int(now) + expires_after_s,
    )
    session.add(file)
    session.flush()
    if checked:
        tasks.enqueue(session, kind="validate", subject_id=file.id, org_id=org_id)
    return file


def name_import(source: HubSource) -> str:
    """What a file fetched from `source` is called."""
    return source.repo.rpartition("/")[2] + ".jsonl"


def start_import(
    session: Session,
    *,
    org_id: str,
    source: HubSource,
    format: str | None = None,
    column_map: dict[str, str] | None = None,
    max_invalid_fraction: float | None = None,
) -> File:
    """Record a training file whose bytes a worker will fetch from `source`, and queue that and its check."""
    file = File(
        id=new_id("file-"),
        org_id=org_id,
        filename=name_import(source),
        purpose="fine-tune",
        bytes=0,
        sha256="",
        status="uploaded",
        format=format,
        column_map=column_map,
        max_invalid_fraction=max_invalid_fraction,
        source=str(source),
        created_at=clock(session),
    )
    session.add(file)
    session.flush()
    tasks.enqueue(session, kind="validate", subject_id=file.id, org_id=org_id)
    return file


def record_bytes(session: Session, file_id: str, writer: BlobWriter) -> bool:
    """The bytes of an imported file have come, synced; False when it was deleted meanwhile."""
    lock_digest(session, writer.sha256)
    file = session.get(File, file_id, with_for_update=True, populate_existing=True)
    if file is None:
        return False
    writer.keep()
    file.bytes, file.sha256 = writer.size_bytes, writer.sha256
    session.flush()
    return True


def get(session: Session, file_id: str, *, org_id: str) -> File:
    """Raises `NotFound`."""
    file = session.scalar(scoped(File, org_id).where(File.id == file_id))
    if file is None:
        raise NotFound("file", file_id)
    return file


def describe_reading(file: File) -> list[Any]:
    """What decides, beside its bytes, which rows a file holds."""
    name = file.filename.lower()
    ending = name.removesuffix(".gz").rpartition(".")[2]
    return [ending, name.endswith(".gz"), file.format, file.column_map, file.max_invalid_fraction]


def list_page(
    session: Session, *, org_id: str, purpose: str | None, after: str | None, limit: int, descending: bool
) -> Page:
    """Files of a tenant by time of upload."""
    select_ = scoped(File, org_id)
    if purpose is not None:
        select_ = select_.where(File.purpose == purpose)
    return paginate(
        session,
        select_,
        order_by=(File.created_at, File.id),
        id_column=File.id,
        after=after,
        limit=limit,
        descending=descending,
    )


def expired(session: Session) -> list[File]:
    """Files of all tenants whose time is over."""
    return list(session.scalars(select(File).where(File.expires_at <= clock(session))))


def delete(database: Database, file_id: str, *, org_id: str, blobs_dir: Path) -> None:
    """Delete a file, and its bytes unless another file has the same. Raises `NotFound`, `Conflict`."""
    with database.write() as session:
        file = session.scalar(scoped(File, org_id).where(File.id == file_id).with_for_update())
        if file is None:
            raise NotFound("file", file_id)
        user = session.scalar(
            scoped(Job, org_id).where(Job.status.not_in(JOB_TERMINAL), job_files.reads(file_id))
        )
        if user is not None:
            raise Conflict("file_in_use", f"File '{file_id}' is used by the unfinished job '{user.id}'.")
        tasks.close_waiting(session, kind="validate", subject_id=file_id)
        session.delete(file)
    if not file.sha256:
        return  # its bytes never came
    # Only after the commit: had it failed, the row would have outlived its bytes.
    with blobs.locked(database, file.sha256) as session:
        same = session.scalar(
            select(func.count()).select_from(
                scoped(File, org_id).where(File.sha256 == file.sha256).subquery()
            )
        )
        if not same:
            previews.forget_content(session, file.sha256, org_id=org_id)  # which quote the rows
            blobs.path_of(blobs_dir, org_id, file.sha256).unlink(missing_ok=True)


def record_check(session: Session, file_id: str, *, report: dict[str, Any], error: str | None) -> None:
    """Store what the check of a file found; `error` is the first thing wrong, None when it can be used."""
    file = session.get(File, file_id, with_for_update=True, populate_existing=True)
    if file is None:
        return  # deleted while it was checked
    file.rows = report.get("rows_used", report.get("rows"))
    file.report = report
    file.status = "processed" if error is None else "error"
    file.status_details = error
    session.flush()
