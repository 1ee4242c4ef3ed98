"""/v1/uploads: large files in parts, in any order; what has come is not lost when a connection is."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, BackgroundTasks, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from api import multipart, reading, render
from api.auth import CallerDep
from api.deps import DatabaseDep, SettingsDep
from api.errors import ApiError
from api.intake import describe_form, on_disk
from api.once import OnceDep
from api.schemas.uploads import CompleteUpload, CreateUpload, UploadObject, UploadPartObject
from db import uploads
from db.blobs import BlobWriter
from db.models import UploadPart
from db.session import Database
from workers.dispatch import ring

router = APIRouter(prefix="/uploads", tags=["Uploads"])

PART_MAX_BYTES = 64 * 1024 * 1024  # as OpenAI's, and what the official clients send


@router.post("", summary="Create upload")
def create_upload(
    body: CreateUpload, caller: CallerDep, settings: SettingsDep, once: OnceDep
) -> UploadObject:
    """Begin a file that comes in parts of at most 64 MiB. It must be completed within an hour."""
    if body.bytes > settings.max_upload_bytes:
        message = f"The file has more than the {settings.max_upload_bytes} bytes allowed."
        raise ApiError(413, "file_too_large", message, param="bytes")
    filename = multipart.label(body.filename)
    said = reading.check(body.model_dump(), filename=filename, purpose=body.purpose)

    def make(session: Session) -> dict[str, Any]:
        upload = uploads.create(
            session,
            org_id=caller.org_id,
            filename=filename,
            purpose=body.purpose,
            size_bytes=body.bytes,
            expires_after_s=body.expires_after.seconds if body.expires_after else None,
            **said,
        )
        seen = uploads.see(session, upload.id, org_id=caller.org_id)
        return render.upload_object(seen).model_dump(mode="json")

    answer = once.answer(make, request=("POST /v1/uploads", body.model_dump(mode="json")))
    return UploadObject.model_validate(answer)


@router.get("/{upload_id}", summary="Retrieve upload")
def retrieve_upload(upload_id: str, caller: CallerDep, database: DatabaseDep) -> UploadObject:
    """How far an upload is: after a broken connection, send the parts that are not there."""
    return _see(database, upload_id, org_id=caller.org_id)


@router.post("/{upload_id}/parts", summary="Add upload part", openapi_extra=describe_form("data"))
async def add_part(
    upload_id: str, request: Request, caller: CallerDep, database: DatabaseDep, settings: SettingsDep
) -> UploadPartObject:
    """Store a part. Parts may come in any order; the same bytes sent again are the same part."""
    await run_in_threadpool(_check_pending, database, upload_id, org_id=caller.org_id)
    with await on_disk(BlobWriter, settings.blobs_dir, caller.org_id) as writer:
        form = await multipart.read_upload(request, writer, file_field="data", max_file_bytes=PART_MAX_BYTES)
        for name in form.fields:
            raise ApiError(400, "unknown_parameter", f"Unknown parameter: '{name}'.", param=name)
        if form.filename is None:
            raise ApiError(
                400, "missing_required_parameter", "Missing required parameter: 'data'.", param="data"
            )
        if writer.size_bytes == 0:
            raise ApiError(400, "empty_file", "The part is empty.", param="data")
        part = await on_disk(
            _store, database, writer, upload_id, org_id=caller.org_id, blobs_dir=settings.blobs_dir
        )
    return render.upload_part_object(part)


def _check_pending(database: Database, upload_id: str, *, org_id: str) -> None:
    with database.read() as session:
        uploads.check_pending(session, upload_id, org_id=org_id)


def _store(
    database: Database, writer: BlobWriter, upload_id: str, *, org_id: str, blobs_dir: Path
) -> UploadPart:
    writer.sync()
    with database.write() as session:
        return uploads.add_part(session, writer, upload_id, org_id=org_id, blobs_dir=blobs_dir)


@router.post("/{upload_id}/complete", summary="Complete upload")
async def complete_upload(
    upload_id: str,
    body: CompleteUpload,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    background: BackgroundTasks,
) -> UploadObject:
    """Make a file of the parts. When it is refused, the upload waits for better parts."""
    await on_disk(
        uploads.complete,
        database,
        upload_id,
        org_id=caller.org_id,
        part_ids=body.part_ids,
        md5=body.md5,
        blobs_dir=settings.blobs_dir,
    )
    background.add_task(ring, "cpu")
    return await run_in_threadpool(_see, database, upload_id, org_id=caller.org_id)


@router.post("/{upload_id}/cancel", summary="Cancel upload")
def cancel_upload(
    upload_id: str, caller: CallerDep, database: DatabaseDep, settings: SettingsDep
) -> UploadObject:
    """End an upload; its parts are deleted."""
    uploads.cancel(database, upload_id, org_id=caller.org_id, blobs_dir=settings.blobs_dir)
    return _see(database, upload_id, org_id=caller.org_id)


def _see(database: Database, upload_id: str, *, org_id: str) -> UploadObject:
    with database.read() as session:
        return render.upload_object(uploads.see(session, upload_id, org_id=org_id))
