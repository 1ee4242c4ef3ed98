"""How a stored file is to be read: by its name and what its owner says of it."""

from db.models import File
from trainers.specs import Layout, SpecError
from workers.settings import WorkerSettings


def layout_of(file: File) -> Layout:
    """What its rows are contained in."""
    limit = WorkerSettings().unpacked_limit_bytes()
    try:
        return Layout.of(
            file.filename,
            file.format,
            file.column_map,
            max_invalid_fraction=file.max_invalid_fraction or 0.0,
            max_unpacked_bytes=limit,
        )
    except SpecError:  # files of older versions had any name, and JSON lines
        return Layout(max_unpacked_bytes=limit)
