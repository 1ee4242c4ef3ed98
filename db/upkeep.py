"""What time alone makes due: what expires, what need not be known any longer, data that nobody uses."""

from db import blobs, files, idempotency, prepared, previews, uploads
from db.errors import Conflict, NotFound
from db.session import Database
from db.settings import DatabaseSettings


def run(database: Database, settings: DatabaseSettings) -> None:
    """Do what is due. Safe to run anywhere and at any time, also twice at once."""
    with database.write() as session:
        idempotency.forget_old(session)
        previews.forget_old(session)
    blobs.sweep(settings.blobs_dir)
    uploads.collect(database, blobs_dir=settings.blobs_dir)
    with database.read() as session:
        expired = files.expired(session)
    for file in expired:
        try:
            files.delete(database, file.id, org_id=file.org_id, blobs_dir=settings.blobs_dir)
        except (Conflict, NotFound):
            continue  # an unfinished job needs it, or somebody else was faster
    with database.read() as session:
        prepared.collect(
            session,
            settings.cache_dir,
            runs_dir=settings.runs_dir,
            unused_s=settings.prepared_unused_s,
        )
