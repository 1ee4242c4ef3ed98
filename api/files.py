"""/v1/files: uploads for training and other purposes."""

import errno
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from api import multipart, render
from api.auth import CallerDep
from api.deps import After, DatabaseDep, SettingsDep
from api.errors import NEVER_RETRY, ApiError
from api.middleware import allow_body
from api.schemas import Deleted, FileList, FileObject
from db import blobs, files
from db.blobs import BlobWriter
from workers.dispatch import ring

router = APIRouter(prefix="/files", tags=["Files"])

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}


@router.post("", summary="Upload file", openapi_extra=_FORM)
async def create_file(
    request: Request,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    background: BackgroundTasks,
) -> FileObject:
    """Store a file. The rows of training files are checked afterwards: watch `status`.

    The body is read here, not by the framework: only then is it known that the caller has a key.
    """
    max_file_bytes = settings.max_upload_bytes
    allow_body(request, limit_bytes=max_file_bytes + multipart.FORM_OVERHEAD_BYTES)
    try:
        with await run_in_threadpool(BlobWriter, settings.blobs_dir, caller.org_id) as writer:
            form = await multipart.read_upload(request, writer, max_file_bytes=max_file_bytes)
            purpose = _checked_purpose(form, size_bytes=writer.size_bytes)
            create = partial(
                files.create, org_id=caller.org_id, filename=form.filename or "", purpose=purpose
            )
            file = await run_in_threadpool(create, database, writer)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = "There is no space left to store the file."
        raise ApiError(507, "disk_full", message, headers=NEVER_RETRY) from error
    background.add_task(ring, "cpu")
    return render.file_object(file)


def _checked_purpose(form: multipart.UploadForm, *, size_bytes: int) -> str:
    for name in form.fields:
        if name != "purpose":
            raise ApiError(400, "unknown_parameter", f"Unknown parameter: '{name}'.", param=name)
    for name, given in (("file", form.filename), ("purpose", form.fields.get("purpose"))):
        if not given:
            raise ApiError(
                400, "missing_required_parameter", f"Missing required parameter: '{name}'.", param=name
            )
    purpose = form.fields["purpose"]
    if purpose not in PURPOSES:
        listed = ", ".join(f"'{known}'" for known in PURPOSES)
        message = f"'{purpose}' is not one of {listed} - 'purpose'"
        raise ApiError(400, "invalid_value", message, param="purpose")
    if size_bytes == 0:
        raise ApiError(400, "empty_file", "The file is empty.", param="file")
    return purpose


@router.get("", summary="List files")
def list_files(
    caller: CallerDep,
    database: DatabaseDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(description="Only files with this purpose.")] = None,
) -> FileList:
    """Your files by time of upload, newest first."""
    with database.read() as session:
        page = files.list_page(
            session,
            org_id=caller.org_id,
            purpose=purpose,
            after=after,
            limit=limit,
            descending=order == "desc",
        )
    objects = [render.file_object(file) for file in page.rows]
    return FileList.model_validate(render.page(objects, has_more=page.has_more))


@router.get("/{file_id}", summary="Retrieve file")
def retrieve_file(file_id: str, caller: CallerDep, database: DatabaseDep) -> FileObject:
    """What is known of a file."""
    with database.read() as session:
        return render.file_object(files.get(session, file_id, org_id=caller.org_id))


@router.delete("/{file_id}", summary="Delete file")
def delete_file(file_id: str, caller: CallerDep, database: DatabaseDep, settings: SettingsDep) -> Deleted:
    """Delete a file and its bytes. Refused while an unfinished job uses it."""
    files.delete(database, file_id, org_id=caller.org_id, blobs_dir=settings.blobs_dir)
    return Deleted(id=file_id, object="file")


@router.get(
    "/{file_id}/content",
    summary="Retrieve file content",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "The bytes."}},
)
def retrieve_content(
    file_id: str, caller: CallerDep, database: DatabaseDep, settings: SettingsDep
) -> FileResponse:
    """The bytes as they were uploaded."""
    with database.read() as session:
        file = files.get(session, file_id, org_id=caller.org_id)
    path = blobs.path_of(settings.blobs_dir, caller.org_id, file.sha256)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)
