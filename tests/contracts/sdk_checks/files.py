"""Files: upload, wait, list, expire, read, delete."""

import hashlib
import time

import openai
from openai import BadRequestError, NotFoundError, OpenAI

from .context import ROWS, Context, conforming, refusal


def check_files_from_upload_to_delete(client: OpenAI, _context: Context) -> None:
    file = conforming(client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune"))
    assert isinstance(file, openai.types.FileObject)
    assert file.id.startswith("file-")
    assert (file.object, file.bytes, file.filename) == ("file", len(ROWS), "rows.jsonl")
    assert (file.purpose, file.status, file.status_details) == ("fine-tune", "uploaded", None)
    assert file.expires_at is None
    assert abs(file.created_at - time.time()) < 60
    checked = client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=60)
    assert conforming(checked).status == "processed"
    assert client.files.retrieve(file.id) == checked
    content = client.files.content(file.id)
    assert content.read() == ROWS
    deleted = conforming(client.files.delete(file.id))
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    assert refusal(NotFoundError, client.files.retrieve, file.id).code == "not_found"
    assert refusal(NotFoundError, client.files.content, file.id).code == "not_found"


def check_files_list(client: OpenAI, _context: Context) -> None:
    made = [
        client.files.create(file=(f"{n}.txt", f"note {n}".encode()), purpose="user_data").id for n in range(5)
    ]
    newest_first = [file.id for file in client.files.list(purpose="user_data", limit=2)]
    assert newest_first[:5] == made[::-1]
    assert len(set(newest_first)) == len(newest_first)
    oldest_first = [file.id for file in client.files.list(purpose="user_data", limit=3, order="asc")]
    assert oldest_first == newest_first[::-1]
    page = client.files.list(purpose="user_data", limit=2)
    assert [conforming(file).id for file in page.data] == made[:2:-1]
    assert (page.object, page.has_more, page.has_next_page()) == ("list", True, True)
    assert [file.id for file in page.get_next_page().data] == made[2:0:-1]
    assert not {file.id for file in client.files.list(purpose="fine-tune")} & set(made)
    for file_id in made:
        client.files.delete(file_id)
    assert not {file.id for file in client.files.list()} & set(made)


def check_files_expire(client: OpenAI, _context: Context) -> None:
    file = client.files.create(
        file=("note.txt", b"note"),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert conforming(file).expires_at == file.created_at + 3600
    assert client.files.retrieve(file.id).expires_at == file.expires_at
    client.files.delete(file.id)
    wishes = {"file": ("note.txt", b"note"), "purpose": "user_data"}
    expiry = {"anchor": "created_at", "seconds": 3599}
    error = refusal(BadRequestError, client.files.create, **wishes, expires_after=expiry)
    assert (error.code, error.param) == ("invalid_value", "expires_after[seconds]")


def check_uploads_in_parts(client: OpenAI, _context: Context) -> None:
    wishes = {"filename": "rows.jsonl", "bytes": len(ROWS), "mime_type": "text/jsonl", "purpose": "fine-tune"}
    md5 = hashlib.md5(ROWS).hexdigest()  # noqa: S324 (the client's choice)
    upload = conforming(client.uploads.upload_file_chunked(file=ROWS, **wishes, part_size=100, md5=md5))
    assert (upload.object, upload.status, upload.bytes) == ("upload", "completed", len(ROWS))
    assert client.files.retrieve(upload.file.id).filename == "rows.jsonl"
    assert client.files.content(upload.file.id).read() == ROWS
    assert client.files.wait_for_processing(upload.file.id, poll_interval=0.2).status == "processed"
    again = client.uploads.upload_file_chunked(file=ROWS, **wishes)
    assert again.file.id != upload.file.id


def check_uploads_step_by_step(client: OpenAI, _context: Context) -> None:
    wishes = {"filename": "rows.jsonl", "bytes": 6, "mime_type": "text/plain", "purpose": "user_data"}
    upload = conforming(client.uploads.create(**wishes))
    assert (upload.status, upload.file, upload.expires_at - upload.created_at) == ("pending", None, 3600)
    late = conforming(client.uploads.parts.create(upload.id, data=b"def"))
    early = client.uploads.parts.create(upload.id, data=b"abc")
    assert (late.object, late.upload_id) == ("upload.part", upload.id)
    error = refusal(BadRequestError, client.uploads.complete, upload.id, part_ids=[early.id])
    assert (error.code, error.param) == ("upload_size_mismatch", "part_ids")
    done = conforming(client.uploads.complete(upload.id, part_ids=[early.id, late.id]))
    assert client.files.content(done.file.id).read() == b"abcdef"
    client.files.delete(done.file.id)
    unwanted = client.uploads.create(**wishes)
    assert conforming(client.uploads.cancel(unwanted.id)).status == "cancelled"
    error = refusal(BadRequestError, client.uploads.parts.create, unwanted.id, data=b"abc")
    assert error.code == "upload_not_pending"
    assert refusal(NotFoundError, client.uploads.cancel, "upload_unknown").code == "not_found"
