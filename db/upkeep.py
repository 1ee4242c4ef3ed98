"""What time alone makes due: files that expire, answers and previews that need not be given again."""

from pathlib import Path

from db import files, idempotency, previews
from db.errors import Conflict, NotFound
from db.session import Database


def run(database: Database, *, blobs_dir: Path) -> None:
    """Do what is due. Safe to run anywhere and at any time, also twice at once."""
    with database.write() as session:
        idempotency.forget_old(session)
        previews.forget_old(session)
    with database.read() as session:
        expired = files.expired(session)
    for file in expired:
        try:
            files.delete(database, file.id, org_id=file.org_id, blobs_dir=blobs_dir)
        except (Conflict, NotFound):
            continue  # an unfinished job needs it, or somebody else was faster
