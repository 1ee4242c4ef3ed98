"""What time alone makes due: files and uploads that expire, answers that need not be given again."""

from pathlib import Path

from db import blobs, files, idempotency, uploads
from db.errors import Conflict, NotFound
from db.session import Database


def run(database: Database, *, blobs_dir: Path) -> None:
    """Do what is due. Safe to run anywhere and at any time, also twice at once."""
    with database.write() as session:
        idempotency.forget_old(session)
    blobs.sweep(blobs_dir)
    uploads.collect(database, blobs_dir=blobs_dir)
    with database.read() as session:
        expired = files.expired(session)
    for file in expired:
        try:
            files.delete(database, file.id, org_id=file.org_id, blobs_dir=blobs_dir)
        except (Conflict, NotFound):
            continue  # an unfinished job needs it, or somebody else was faster
