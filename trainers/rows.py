"""Training files, read line by line in bounded memory: JSON rows in any known format, or plain text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainers.json_values import load_json
from trainers.row_formats import (
    FORMATS,
    PLAIN_TEXT,
    AnyRow,
    Document,
    RowKind,
    detect_format,
    kind_of,
    read_row,
)

MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True)
class RowError:
    """What is wrong with a line, counted from 1."""

    line: int
    message: str


class Rows:
    """Reads a file row by row: each item is a row or the RowError of that line.

    With `plain_text` each line is a document. Otherwise the first valid row decides the format of the file.
    Counts are complete once the iteration has ended.
    """

    def __init__(self, path: Path, *, plain_text: bool = False):
        self._path = path
        self.format: str | None = PLAIN_TEXT if plain_text else None
        self.n_rows = 0  # lines that hold something, valid or not
        self.blank_lines = 0

    def __iter__(self) -> Iterator[AnyRow | RowError]:
        with self._path.open("rb") as file:
            for line, data in _split_lines(file):
                if data is not None and not data.strip():
                    self.blank_lines += 1
                    continue
                self.n_rows += 1
                try:
                    yield self._read(data, line=line)
                except ValueError as error:
                    yield RowError(line, str(error))
                    if line == 1 and data is not None and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
                        return  # UTF-16: every further line would repeat the complaint
        if self.n_rows == 0:
            yield RowError(1, "the file holds no rows" if self.blank_lines else "the file is empty")

    @property
    def kind(self) -> RowKind | None:
        """What the rows are to a method; None before the first valid one."""
        return kind_of(self.format) if self.format else None

    def _read(self, data: bytes | None, *, line: int) -> AnyRow:
        text = _decode_line(data, first=line == 1)
        if self.format == PLAIN_TEXT:
            return Document(line, text.rstrip("\r\n"))
        row = _parse_line(text, first=line == 1)
        # Among conversations, one that ends with a question is a fault and no prompt.
        name = "messages" if self.format == "messages" and "messages" in row else detect_format(row)
        if self.format and {name, self.format} == {"messages", "prompt_messages"}:
            name = self.format  # the first row has said whether answers are wanted
        if self.format and name != self.format:
            raise ValueError(
                f"this row is {FORMATS[name].looks}, but the rows before it are {FORMATS[self.format].looks}"
            )
        read = read_row(row, name, line=line)
        self.format = name
        return read


def count_rows(path: Path) -> int:
    """How many rows a file holds, valid or not."""
    with path.open("rb") as file:
        return sum(data is None or bool(data.strip()) for _, data in _split_lines(file))


def _split_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(1-based number, bytes) of each line; None for one that is too long to be held in memory."""
    line = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(data) <= MAX_LINE_BYTES:
            yield line, data
            continue
        while data and not data.endswith(b"\n"):
            data = file.readline(MAX_LINE_BYTES)
        yield line, None


def _decode_line(data: bytes | None, *, first: bool) -> str:
    if data is None:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    if first and data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("the file starts with a byte order mark; save it as UTF-8 without one")
    if first and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("the file is UTF-16; save it as UTF-8")
    if b"\0" in data:
        raise ValueError("the line holds a NUL byte")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 (byte {error.start + 1})") from None


def _parse_line(text: str, *, first: bool) -> dict[str, Any]:
    hint = "; JSONL has one whole object a line" if first and text.lstrip()[:1] in ("[", "{") else ""
    row = load_json(text, "the line", hint=hint)
    if isinstance(row, list):
        raise ValueError("the line is a JSON array; JSONL has one object a line")
    if not isinstance(row, dict):
        raise ValueError("the line is not a JSON object")
    return row
