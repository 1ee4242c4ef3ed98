"""/v1/files: uploads for training and other purposes."""

import base64
import dataclasses
import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse
from sqlalchemy.orm import Session

from api import multipart, render
from api.auth import CallerDep
from api.deps import After, DatabaseDep, SettingsDep
from api.errors import NEVER_RETRY, ApiError, hint
from api.middleware import allow_body
from api.once import Once, OnceDep
from api.report_schemas import FileReport
from api.schemas import Deleted, FileList, FileObject, ImportFile
from api.sources import check_hub
from db import blobs, files
from db.blobs import BlobWriter
from trainers.specs import Layout
from trainers.specs.layouts import FORMAT_KEYS, PLAIN_TEXT
from workers.dispatch import ring

router = APIRouter(prefix="/files", tags=["Files"])

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_READING = ("format", "column_map", "max_invalid_fraction")
_FIELDS = ("purpose", _ANCHOR, _SECONDS, *_READING)
_REPORT_RETRY_S = "2"
_COLUMN = re.compile(r"column_map\[(.+)\]")  # how the official clients write an object
_BASE64_CHUNK_BYTES = 3 * 256 * 1024  # of whole threes, so that no padding comes in the middle
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
                        _ANCHOR: {"type": "string", "enum": ["created_at"]},
                        _SECONDS: {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
                        "format": {"type": "string", "enum": [*FORMAT_KEYS, PLAIN_TEXT]},
                        "column_map": {
                            "type": "object",
                            "additionalProperties": {"type": "string"},
                            "description": "The file's own names for keys of rows: {key: column}.",
                        },
                        "max_invalid_fraction": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
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
    settings: SettingsDep,
    once: OnceDep,
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
            wishes = _check(form, size_bytes=writer.size_bytes)
            answer = await run_in_threadpool(_store, once, writer, org_id=caller.org_id, wishes=wishes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = "There is no space left to store the file."
        raise ApiError(507, "disk_full", message, headers=NEVER_RETRY) from error
    background.add_task(ring, "cpu")
    return FileObject.model_validate(answer)


def _store(once: Once, writer: BlobWriter, *, org_id: str, wishes: dict[str, Any]) -> dict[str, Any]:
    writer.sync()

    def make(session: Session) -> dict[str, Any]:
        file = files.create(session, writer, org_id=org_id, **wishes)
        return render.file_object(file).model_dump(mode="json")

    return once.answer(make, request=("POST /v1/files", {"sha256": writer.sha256, **wishes}))


def _check(form: multipart.UploadForm, *, size_bytes: int) -> dict[str, Any]:
    """What the form asks for, as `files.create` takes it. Raises ApiError."""
    for name in form.fields:
        if name not in _FIELDS and not _COLUMN.fullmatch(name):
            message = f"Unknown parameter: '{name}'.{hint(name, _FIELDS)}"
            raise ApiError(400, "unknown_parameter", message, param=name)
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
    wishes = {"filename": form.filename, "purpose": purpose, "expires_after_s": _read_expiry(form.fields)}
    return wishes | _read_layout(form, purpose=purpose)


def _read_layout(form: multipart.UploadForm, *, purpose: str) -> dict[str, Any]:
    """What the form says of the rows. Raises ApiError, SpecError."""
    said = {
        "format": form.fields.get("format"),
        "column_map": _read_column_map(form.fields),
        "max_invalid_fraction": _read_fraction(form.fields),
    }
    if purpose == "fine-tune":
        Layout.of(str(form.filename), said["format"], said["column_map"])
        return said
    given = next((name for name, value in said.items() if value is not None), None)
    if given is not None:
        message = f"'{given}' is said of files with the purpose 'fine-tune' only."
        raise ApiError(400, "invalid_value", message, param=given)
    return said


def _read_fraction(fields: dict[str, str]) -> float | None:
    text = fields.get("max_invalid_fraction")
    if text is None:
        return None
    if not re.fullmatch(r"0|0?\.[0-9]{1,9}", text):
        message = "'max_invalid_fraction' must be a number from 0 up to 1, which is left out: 0.01."
        raise ApiError(400, "invalid_value", message, param="max_invalid_fraction")
    return float(text)


def _read_column_map(fields: dict[str, str]) -> dict[str, str] | None:
    """`column_map` as one JSON object, or as a field a key: `column_map[question]`."""
    named = {found[1]: value for name, value in fields.items() if (found := _COLUMN.fullmatch(name))}
    text = fields.get("column_map")
    if text is None:
        return named or None
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not all(isinstance(column, str) for column in given.values()) or named:
        message = '\'column_map\' must be an object of texts: {"our key": "your column"}.'
        raise ApiError(400, "invalid_value", message, param="column_map")
    return given or None


def _read_expiry(fields: dict[str, str]) -> int | None:
    anchor, seconds = fields.get(_ANCHOR), fields.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        message = f"'{_ANCHOR}' must be 'created_at'."
        raise ApiError(400, "invalid_value", message, param=_ANCHOR)
    if seconds is None or not re.fullmatch(r"[0-9]{4,7}", seconds) or not 3600 <= int(seconds) <= 2_592_000:
        message = f"'{_SECONDS}' must be a whole number from 3600 to 2592000."
        raise ApiError(400, "invalid_value", message, param=_SECONDS)
    return int(seconds)


@router.post("/import", summary="Import file")
def import_file(
    body: ImportFile, caller: CallerDep, settings: SettingsDep, once: OnceDep, background: BackgroundTasks
) -> FileObject:
    """Fetch training data from a hub as JSONL. It is checked like an upload: watch `status`."""
    source = check_hub(body.source, settings)
    if source.config is not None or source.split is not None:
        message = "The config and the split are parameters of their own."
        raise ApiError(400, "invalid_value", message, param="source")
    source = dataclasses.replace(source, config=body.config, split=body.split)

    def make(session: Session) -> dict[str, Any]:
        file = files.start_import(session, org_id=caller.org_id, source=source)
        return render.file_object(file).model_dump(mode="json")

    answer = once.answer(make, request=("POST /v1/files/import", body.model_dump(mode="json")))
    background.add_task(ring, "cpu")
    return FileObject.model_validate(answer)


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


@router.get("/{file_id}/report", summary="Retrieve file report")
def retrieve_report(file_id: str, caller: CallerDep, database: DatabaseDep) -> FileReport:
    """What the check of a training file found: rows refused by line and reason, duplicates, scripts."""
    with database.read() as session:
        file = files.get(session, file_id, org_id=caller.org_id)
        report = file.report
    if file.status == "uploaded":
        message = f"'{file_id}' is not checked yet."
        headers = {"retry-after": _REPORT_RETRY_S}
        raise ApiError(404, "report_not_ready", message, param="file_id", headers=headers)
    if not report or "accepted" not in report:  # another purpose, a check that broke, an older version
        message = f"There is no report of '{file_id}'."
        raise ApiError(404, "no_report", message, param="file_id")
    return FileReport.model_validate({"file_id": file_id} | report)


@router.delete("/{file_id}", summary="Delete file")
def delete_file(file_id: str, caller: CallerDep, database: DatabaseDep, settings: SettingsDep) -> Deleted:
    """Delete a file and its bytes. Refused while an unfinished job uses it."""
    files.delete(database, file_id, org_id=caller.org_id, blobs_dir=settings.blobs_dir)
    return Deleted(id=file_id, object="file")


@router.get(
    "/{file_id}/content",
    summary="Retrieve file content",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "The bytes."}},
)
def retrieve_content(
    file_id: str,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    encoding: Annotated[
        Literal["base64"] | None,
        Query(description="`base64`: as text, which is how OpenAI sends result files."),
    ] = None,
) -> Response:
    """The bytes of a file."""
    with database.read() as session:
        file = files.get(session, file_id, org_id=caller.org_id)
    if not file.sha256:
        raise ApiError(404, "file_not_ready", f"The bytes of '{file_id}' have not come.", param="file_id")
    path = blobs.path_of(settings.blobs_dir, caller.org_id, file.sha256)
    if encoding == "base64":
        return StreamingResponse(_read_base64(path), media_type="text/plain")
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


def _read_base64(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while chunk := source.read(_BASE64_CHUNK_BYTES):
            yield base64.b64encode(chunk)
