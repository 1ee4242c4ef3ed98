"""Files that come in parts: each stored once by its content, all put together in the order asked for."""

import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from db import blobs, files
from db.blobs import BlobWriter
from db.errors import Conflict, Corrupt, NotFound
from db.ids import new_id
from db.models import File, Upload, UploadPart
from db.scope import scoped
from db.session import Database, clock

LIFETIME_S = 3600.0
MAX_PARTS = 10_000
_FOLDER = "parts"


class Seen(NamedTuple):
    """An upload as it is now: `status` knows the time, `parts` are in the order in which they came."""

    upload: Upload
    status: str
    parts: list[UploadPart]
    file: File | None


def create(
    session: Session,
    *,
    org_id: str,
    filename: str,
    purpose: str,
    size_bytes: int,
    expires_after_s: int | None = None,
    format: str | None = None,
    column_map: dict[str, str] | None = None,
    max_invalid_fraction: float | None = None,
) -> Upload:
    """An upload that waits for its parts; `expires_after_s` and the rest is for the file that they make."""
    now = clock(session)
    upload = Upload(
        id=new_id("upload_"),
        org_id=org_id,
        filename=filename,
        purpose=purpose,
        bytes=size_bytes,
        file_expires_after_s=expires_after_s,
        format=format,
        column_map=column_map,
        max_invalid_fraction=max_invalid_fraction,
        status="pending",
        created_at=now,
        expires_at=now + LIFETIME_S,
    )
    session.add(upload)
    session.flush()
    return upload


def see(session: Session, upload_id: str, *, org_id: str) -> Seen:
    """Raises `NotFound`."""
    upload = _get(session, upload_id, org_id=org_id)
    file = scoped(File, org_id).where(File.id == upload.file_id)
    return Seen(
        upload,
        _status_of(session, upload),
        _parts_of(session, upload),
        session.scalar(file) if upload.file_id else None,
    )


def check_pending(session: Session, upload_id: str, *, org_id: str) -> None:
    """Whether parts may still come. Raises `NotFound`, `Conflict`."""
    _refuse_ended(session, _get(session, upload_id, org_id=org_id))


def add_part(
    session: Session, writer: BlobWriter, upload_id: str, *, org_id: str, blobs_dir: Path
) -> UploadPart:
    """Record a part with its synced bytes, or find the one that is there. Raises `NotFound`, `Conflict`."""
    upload = _get(session, upload_id, org_id=org_id, hold=True)
    _refuse_ended(session, upload)
    mine = scoped(UploadPart, org_id).where(UploadPart.upload_id == upload_id)
    known = session.scalar(mine.where(UploadPart.sha256 == writer.sha256))
    target = _folder_of(blobs_dir, upload_id) / writer.sha256
    if known is not None:
        writer.keep(target)  # in place of bytes that may have suffered
        return known
    parts = mine.subquery()
    sums = select(func.count(), func.coalesce(func.sum(parts.c.bytes), 0)).select_from(parts)
    count, stored_bytes = session.execute(sums).one()
    if count >= MAX_PARTS:
        raise Conflict("too_many_parts", f"The upload has {MAX_PARTS} parts already.", param="data")
    if stored_bytes + writer.size_bytes > upload.bytes:
        message = f"The parts have more than the {upload.bytes} bytes that the upload was made for."
        raise Conflict("upload_size_mismatch", message, param="data")
    writer.keep(target)
    part = UploadPart(
        id=new_id("part_"),
        org_id=org_id,
        upload_id=upload_id,
        bytes=writer.size_bytes,
        sha256=writer.sha256,
        created_at=clock(session),
    )
    session.add(part)
    session.flush()
    return part


def complete(
    database: Database, upload_id: str, *, org_id: str, part_ids: list[str], md5: str | None, blobs_dir: Path
) -> None:
    """Make a file of the parts in the order of `part_ids`; once it is made, the same order changes nothing.

    `md5` is a hex digest that the whole must have. Raises `NotFound`, `Conflict`, `Corrupt`.
    """
    order_sha256 = hashlib.sha256("\n".join(part_ids).encode()).hexdigest()
    with database.read() as session:
        upload = _get(session, upload_id, org_id=org_id)
        if _is_completed(session, upload, order_sha256=order_sha256):
            return
        chosen = _choose(upload, _parts_of(session, upload), part_ids)
    with BlobWriter(blobs_dir, org_id) as writer:
        try:
            _assemble(writer, chosen, folder=_folder_of(blobs_dir, upload_id), md5=md5)
        except FileNotFoundError as error:
            with database.read() as session:  # ended meanwhile, or else damaged
                upload = _get(session, upload_id, org_id=org_id)
                if _is_completed(session, upload, order_sha256=order_sha256):
                    return
            raise Corrupt(f"A part of upload '{upload_id}' is gone from the disk.") from error
        writer.sync()
        with database.write() as session:
            upload = _get(session, upload_id, org_id=org_id, hold=True)
            if _is_completed(session, upload, order_sha256=order_sha256):
                return
            file = files.create(
                session,
                writer,
                org_id=org_id,
                filename=upload.filename,
                purpose=upload.purpose,
                expires_after_s=upload.file_expires_after_s,
                format=upload.format,
                column_map=upload.column_map,
                max_invalid_fraction=upload.max_invalid_fraction,
            )
            upload.order_sha256, upload.file_id = order_sha256, file.id
            _end(session, upload, status="completed")
    _remove_parts(blobs_dir, upload_id)


def cancel(database: Database, upload_id: str, *, org_id: str, blobs_dir: Path) -> None:
    """End an upload without a file; its parts are removed. Raises `NotFound`, `Conflict`."""
    with database.write() as session:
        upload = _get(session, upload_id, org_id=org_id, hold=True)
        if upload.status == "cancelled":
            return
        _refuse_ended(session, upload)
        _end(session, upload, status="cancelled")
    _remove_parts(blobs_dir, upload_id)


def collect(database: Database, *, blobs_dir: Path) -> None:
    """End the uploads of all tenants whose time is over; remove the parts of all that have ended."""
    with database.write() as session:
        over = select(Upload).where(Upload.status == "pending", Upload.expires_at <= clock(session))
        for upload in session.scalars(over.with_for_update()):
            _end(session, upload, status="expired")
    for folder in (blobs_dir / _FOLDER).glob("*"):
        with database.read() as session:
            upload = session.get(Upload, folder.name)
        if upload is None or upload.status != "pending":
            _remove_parts(blobs_dir, folder.name)


def _get(session: Session, upload_id: str, *, org_id: str, hold: bool = False) -> Upload:
    query = scoped(Upload, org_id).where(Upload.id == upload_id)
    if hold:
        query = query.with_for_update().execution_options(populate_existing=True)
    upload = session.scalar(query)
    if upload is None:
        raise NotFound("upload", upload_id)
    return upload


def _status_of(session: Session, upload: Upload) -> str:
    """The status as it is now, also before the upkeep has come by."""
    over = upload.status == "pending" and upload.expires_at <= clock(session)
    return "expired" if over else upload.status


def _refuse_ended(session: Session, upload: Upload) -> None:
    if (status := _status_of(session, upload)) != "pending":
        raise Conflict("upload_not_pending", f"Upload '{upload.id}' is {status}.", param="upload_id")


def _is_completed(session: Session, upload: Upload, *, order_sha256: str) -> bool:
    """Whether this very request was carried out before. Raises `Conflict` when the upload ended otherwise."""
    if upload.order_sha256 == order_sha256:
        return True
    _refuse_ended(session, upload)
    return False


def _parts_of(session: Session, upload: Upload) -> list[UploadPart]:
    parts = scoped(UploadPart, upload.org_id).where(UploadPart.upload_id == upload.id)
    return list(session.scalars(parts.order_by(UploadPart.created_at, UploadPart.id)))


def _choose(upload: Upload, parts: list[UploadPart], part_ids: list[str]) -> list[UploadPart]:
    """The parts that the ids name, which have as many bytes as the upload was made for."""
    by_id = {part.id: part for part in parts}
    for part_id in part_ids:
        if part_id not in by_id:
            raise Conflict("invalid_value", f"The upload has no part '{part_id}'.", param="part_ids")
    chosen = [by_id[part_id] for part_id in part_ids]
    total_bytes = sum(part.bytes for part in chosen)
    if total_bytes != upload.bytes:
        message = f"The parts have {total_bytes} bytes; the upload was made for {upload.bytes}."
        raise Conflict("upload_size_mismatch", message, param="part_ids")
    return chosen


def _assemble(writer: BlobWriter, parts: list[UploadPart], *, folder: Path, md5: str | None) -> None:
    """Write the parts one after the other. Raises `Corrupt`; `Conflict` when the whole has another `md5`."""
    whole = hashlib.md5(usedforsecurity=False)
    for part in parts:
        sha256 = hashlib.sha256()
        for chunk in blobs.read_chunks(folder / part.sha256):
            sha256.update(chunk)
            if md5 is not None:
                whole.update(chunk)
            writer.write(chunk)
        if sha256.hexdigest() != part.sha256:
            raise Corrupt(f"The stored bytes of part '{part.id}' have changed.")
    if md5 is not None and md5.lower() != whole.hexdigest():
        message = f"The MD5 digest of the parts is {whole.hexdigest()}."
        raise Conflict("digest_mismatch", message, param="md5")


def _end(session: Session, upload: Upload, *, status: str) -> None:
    upload.status = status
    session.execute(delete(UploadPart).where(UploadPart.upload_id == upload.id))
    session.flush()


def _remove_parts(blobs_dir: Path, upload_id: str) -> None:
    """Only after the commit that ended the upload: until then it needs them, and more may come."""
    shutil.rmtree(_folder_of(blobs_dir, upload_id), ignore_errors=True)


def _folder_of(blobs_dir: Path, upload_id: str) -> Path:
    return blobs_dir / _FOLDER / upload_id
