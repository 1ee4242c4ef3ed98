"""/v1/files: uploads for training and other purposes."""

import dataclasses
import re
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, BackgroundTasks, Depends, Header, Query, Request, Response
from sqlalchemy.orm import Session

from api import content, digests, intake, multipart, reading, render
from api.auth import CallerDep
from api.deps import After, DatabaseDep, SettingsDep
from api.errors import ApiError, hint
from api.once import Once, OnceDep
from api.schemas.common import Deleted, Purpose
from api.schemas.files import FileList, FileObject
from api.schemas.reports import FileReport
from api.schemas.uploads import ImportFile
from api.sources import check_hub
from db import blobs, files
from db.blobs import BlobWriter
from workers.dispatch import ring

router = APIRouter(prefix="/files", tags=["Files"])

PURPOSES = get_args(Purpose)
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = ("purpose", _ANCHOR, _SECONDS, *reading.FIELDS)
_REPORT_RETRY_S = "2"
_FORM_FIELDS: dict[str, Any] = {
    "purpose": {"type": "string", "enum": list(PURPOSES)},
    _ANCHOR: {"type": "string", "enum": ["created_at"]},
    _SECONDS: {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    **reading.PROPERTIES,
}
_FORM = intake.describe_form("file", "purpose", **_FORM_FIELDS)
_RAW = intake.describe_body("application/octet-stream", intake.BINARY)


@router.post("", summary="Upload file", openapi_extra=_FORM)
async def create_file(
    request: Request,
    caller: CallerDep,
    settings: SettingsDep,
    once: OnceDep,
    background: BackgroundTasks,
) -> FileObject:
    """Store a file. The rows of training files are checked afterwards: watch `status`.

    The body goes to its place as it comes, and is written only once.
    """
    with await intake.on_disk(BlobWriter, settings.blobs_dir, caller.org_id) as writer:
        form = await multipart.read_upload(
            request, writer, file_field="file", max_file_bytes=settings.max_upload_bytes
        )
        wishes = _check(form)
        _refuse_empty(writer)
        answer = await intake.on_disk(_store, once, writer, org_id=caller.org_id, wishes=wishes)
    background.add_task(ring, "cpu")
    return FileObject.model_validate(answer)


@router.put("", summary="Upload raw file", openapi_extra=_RAW)
async def put_file(
    request: Request,
    caller: CallerDep,
    settings: SettingsDep,
    once: OnceDep,
    background: BackgroundTasks,
    filename: Annotated[str, Query(min_length=1)],
    purpose: Purpose,
    rows: Annotated[reading.Said, Depends()],
    anchor: Annotated[Literal["created_at"] | None, Query(alias=_ANCHOR)] = None,
    seconds: Annotated[int | None, Query(alias=_SECONDS, ge=3600, le=2_592_000)] = None,
    sha256: Annotated[
        str | None,
        Query(pattern=r"^[0-9a-fA-F]{64}$", description="What the bytes must have, in hexadecimal."),
    ] = None,
    repr_digest: Annotated[
        str | None, Header(description="What the bytes must have, as in RFC 9530: `sha-256=:BASE64:`.")
    ] = None,
) -> FileObject:
    """Store a file whose bytes are the body: faster than a form, and otherwise the same.

    Where a digest is given, bytes that do not have it are not stored.
    """
    filename = multipart.label(filename)
    said = {name: value for name, value in rows.model_dump().items() if value is not None}
    wishes: dict[str, Any] = {
        "filename": filename,
        "purpose": purpose,
        "expires_after_s": _read_expiry(anchor, None if seconds is None else str(seconds)),
        **reading.read(said, filename=filename, purpose=purpose),
    }
    promised = [digest.lower() for digest in (sha256, digests.read(repr_digest or "")) if digest]
    with await intake.on_disk(BlobWriter, settings.blobs_dir, caller.org_id) as writer:
        await intake.read_raw(request, writer, limit_bytes=settings.max_upload_bytes)
        _refuse_empty(writer)
        if any(digest != writer.sha256 for digest in promised):
            message = f"The bytes that came have the SHA-256 digest {writer.sha256}."
            raise ApiError(400, "digest_mismatch", message, param="sha256" if sha256 else digests.HEADER)
        answer = await intake.on_disk(_store, once, writer, org_id=caller.org_id, wishes=wishes)
    background.add_task(ring, "cpu")
    return FileObject.model_validate(answer)


def _store(once: Once, writer: BlobWriter, *, org_id: str, wishes: dict[str, Any]) -> dict[str, Any]:
    writer.sync()

    def make(session: Session) -> dict[str, Any]:
        file = files.create(session, writer, org_id=org_id, **wishes)
        return render.file_object(file).model_dump(mode="json")

    return once.answer(make, request=("POST /v1/files", {"sha256": writer.sha256, **wishes}))


def _check(form: multipart.UploadForm) -> dict[str, Any]:
    """What the form asks for, as `files.create` takes it. Raises ApiError."""
    for name in form.fields:
        if name not in _FIELDS and not reading.names_column(name):
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
    expires_after_s = _read_expiry(form.fields.get(_ANCHOR), form.fields.get(_SECONDS))
    wishes = {"filename": str(form.filename), "purpose": purpose, "expires_after_s": expires_after_s}
    return wishes | reading.read(form.fields, filename=str(form.filename), purpose=purpose)


def _refuse_empty(writer: BlobWriter) -> None:
    if writer.size_bytes == 0:
        raise ApiError(400, "empty_file", "The file is empty.", param="file")


def _read_expiry(anchor: str | None, seconds: str | None) -> int | None:
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
    said = reading.check(body.model_dump(), filename=files.name_import(source), purpose=body.purpose)

    def make(session: Session) -> dict[str, Any]:
        file = files.start_import(session, org_id=caller.org_id, source=source, **said)
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
    request: Request,
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    encoding: Annotated[
        Literal["base64"] | None,
        Query(description="`base64`: as text, which is how OpenAI sends result files."),
    ] = None,
) -> Response:
    """The bytes of a file. Where they have changed on the disk, the answer is an error or breaks off."""
    with database.read() as session:
        file = files.get(session, file_id, org_id=caller.org_id)
    if not file.sha256:
        raise ApiError(404, "file_not_ready", f"The bytes of '{file_id}' have not come.", param="file_id")
    path = blobs.path_of(settings.blobs_dir, caller.org_id, file.sha256)
    blobs.check_size(path, size_bytes=file.bytes)
    if encoding == "base64":
        return content.answer_base64(path, sha256=file.sha256)
    is_range = "range" in request.headers
    return content.answer(path, sha256=file.sha256, filename=file.filename, is_range=is_range)
