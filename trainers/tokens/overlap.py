"""Rows that are trained on and evaluated too: found by content, reported, refused where they are many."""

import hashlib
import json
from array import array
from dataclasses import fields
from pathlib import Path

from trainers.folders.events import Events
from trainers.folders.exits import DataError
from trainers.rows.formats import AnyRow

FINGERPRINTS_FILE = "fingerprints.npy"
_LISTED_LINES = 20


class Fingerprints:
    """What rows say, 8 bytes each, with the lines they came from."""

    def __init__(self) -> None:
        self._numbers = array("q")

    def add(self, row: AnyRow) -> None:
        """Note a row. Where it stands, and columns that no method reads, make no difference."""
        said = {field.name: getattr(row, field.name) for field in fields(row)}
        del said["line"]
        said.pop("item", None)
        text = json.dumps(said, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        self._numbers.extend((row.line, int.from_bytes(digest, "little", signed=True)))

    def write(self, path: Path) -> None:
        """Store them as an int64 array of [line, fingerprint]."""
        import numpy

        numpy.save(path, numpy.frombuffer(self._numbers, dtype=numpy.int64).reshape(-1, 2))


def report_overlap(train: list[Path], validation: list[Path], *, limit: float, events: Events) -> None:
    """Tell how many validation rows the training files have too, whatever share of these is taken.

    Raises DataError where they are more than `limit`.

    train, validation: folders of prepared files. limit: a share of the validation rows.
    """
    import numpy

    seen = numpy.concatenate([_read(folder)[:, 1] for folder in train])
    held = numpy.concatenate([_read(folder) for folder in validation])
    lines = held[numpy.isin(held[:, 1], seen), 0]
    if not len(lines):
        return
    share = len(lines) / len(held)
    message = f"{len(lines)} of {len(held)} validation rows are in the training files too"
    if share > limit:
        raise DataError(
            f"{message}: what is measured on them would not tell what was learnt. Take other validation "
            f"rows, or allow this with max_validation_overlap {round(share + 0.005, 2):g} (it is {limit:g})"
        )
    events.message(
        message,
        level="warn",
        code="validation_overlap",
        rows=len(lines),
        of=len(held),
        lines=sorted(map(int, lines))[:_LISTED_LINES],
    )


def _read(folder: Path):
    import numpy

    return numpy.load(folder / FINGERPRINTS_FILE, mmap_mode="r")
