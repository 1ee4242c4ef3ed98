"""How a stored file is to be read: by its name and what its owner says of it."""

from db.models import File
from trainers.specs import Layout
from workers.settings import WorkerSettings


def layout_of(file: File) -> Layout:
    """What its rows are contained in."""
    return Layout.of_stored(
        file.filename,
        format=file.format,
        column_map=file.column_map,
        max_invalid_fraction=file.max_invalid_fraction,
        max_unpacked_bytes=WorkerSettings().unpacked_limit_bytes(),
    )
