"""The header of a GGUF file, with every count held against the bytes that are there (no torch).

The reader that transformers uses believes what is declared: an array of 2**63 elements in a file of 100 bytes
makes it run, and take memory, without end.
"""

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trainers.folders.artifacts import Refused

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ELEMENTS = 4_000_000  # the largest vocabularies have 262,144 tokens and about twice as many merges
_MAX_PAIRS, _MAX_TENSORS, _MAX_DIMENSIONS = 10_000, 1_000_000, 4
_VERSIONS = (2, 3)
_BITS_AN_ELEMENT = 1  # no quantization packs a weight into less


@dataclass
class GgufHeader:
    """What a GGUF file declares: its numbers and texts (no arrays), and how many tensors it has."""

    n_tensors: int
    values: dict[str, Any] = field(default_factory=dict)


def read_gguf_header(path: Path) -> GgufHeader:
    """Walk the whole header. Raises Refused unless all of it, and of the tensors it lists, is in the file."""
    with path.open("rb") as file:
        reader = _Reader(file)
        if reader.take(4) != b"GGUF":
            raise Refused("not_a_model", f"{path.name} is not a GGUF file.")
        version = reader.number("I")
        if version not in _VERSIONS:
            raise Refused("bad_gguf", f"GGUF version {version} is not supported.")
        n_tensors, n_pairs = reader.number("Q"), reader.number("Q")
        if n_tensors > _MAX_TENSORS or n_pairs > _MAX_PAIRS:
            raise Refused("bad_gguf", f"The file declares {n_tensors} tensors and {n_pairs} values.")
        header = GgufHeader(n_tensors)
        for _ in range(n_pairs):
            name, kind = reader.text(), reader.number("I")
            value = reader.value(kind)
            if value is not None:
                header.values[name] = value
        elements = sum(reader.tensor() for _ in range(n_tensors))
        if elements * _BITS_AN_ELEMENT > reader.size_bytes * 8:
            raise Refused("bad_gguf", f"The file is too short for its {elements} weights.")
    return header


class _Reader:
    """Reads little-endian values; whatever would reach past the end of the file is refused."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size_bytes = os.fstat(file.fileno()).st_size

    def take(self, n_bytes: int) -> bytes:
        self._need(n_bytes)
        return self._file.read(n_bytes)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise Refused("bad_gguf", "A text of the header is not UTF-8.") from None

    def value(self, kind: int) -> Any:
        """A number or a text; None for an array, which is only walked over."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._skip_array()
        if kind not in _SCALARS:
            raise Refused("bad_gguf", f"The header has a value of the unknown type {kind}.")
        return self.number(_SCALARS[kind])

    def tensor(self) -> int:
        """Walk over the description of one tensor; the number of its elements."""
        self.text()
        n_dimensions = self.number("I")
        if n_dimensions > _MAX_DIMENSIONS:
            raise Refused("bad_gguf", f"The file declares a tensor with {n_dimensions} dimensions.")
        elements = 1
        for _ in range(n_dimensions):
            elements *= self.number("Q")
        self.take(12)  # its type and where it lies
        return elements

    def _skip_array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if count > _MAX_ELEMENTS:
            raise Refused("bad_gguf", f"The file declares an array of {count} elements.")
        if kind == _STRING:
            for _ in range(count):
                self._skip(self.number("Q"))
        elif kind in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[kind]))
        else:
            raise Refused("bad_gguf", f"The header has an array of the unknown type {kind}.")

    def _skip(self, n_bytes: int) -> None:
        self._need(n_bytes)
        self._file.seek(n_bytes, os.SEEK_CUR)

    def _need(self, n_bytes: int) -> None:
        if n_bytes > self.size_bytes - self._file.tell():
            raise Refused("bad_gguf", "The file ends inside its header.")
