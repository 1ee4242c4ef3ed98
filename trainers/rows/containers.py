"""What files contain: the records of JSON lines, JSON arrays, tables and plain text, in bounded memory."""

import csv
import io
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import GzipFile
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast

from trainers.rows.parquet import read_table
from trainers.specs.faults import RowFault, Unreadable
from trainers.specs.layouts import Layout

MAX_LINE_BYTES = 16 << 20  # of a line, an element of an array, or a record of a table
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 18
# A whole string, or what opens, parts and closes values; a lone quote is a string that goes on.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # as surrogateescape decodes it


@dataclass(frozen=True)
class Span:
    """A part of a file, as offsets in bytes."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Block:
    """Lines of a file that follow each other: from which one, and their bytes, whole and one by one.

    Blank lines are as they are; no line has its end. `data` is empty where a line is too long to be kept.
    """

    first: int
    data: bytes
    records: list["Record"]


# The bytes of a JSON text or of a line of text, the columns of a table's row, or why there is neither.
Record = bytes | dict[str, Any] | RowFault


def read_records(path: Path, layout: Layout, *, span: Span | None = None) -> Iterator[tuple[int, Record]]:
    """(line, counted from 1, or row of a Parquet file; what is there). Blank lines are empty bytes.

    span: of JSON lines, a part of the file; its lines are counted from 1 too.
    Raises Unreadable where the rest of the file cannot be read.
    """
    if layout.container == "parquet":
        yield from _read_parquet(path, layout)
        return
    with _opened(path, layout, span=span) as source:
        if layout.container in ("csv", "tsv"):
            yield from _read_table(source, delimiter="," if layout.container == "csv" else "\t")
        elif layout.container == "json" and _starts_array(source):
            yield from _split_array(source)
        else:
            for block in _split_lines(source, n_bytes=span.end - span.start if span else None):
                for line, record in enumerate(block.records, block.first):
                    yield line, b"" if isinstance(record, bytes) and record.isspace() else record


def read_blocks(path: Path, layout: Layout, *, span: Span | None = None) -> Iterator[Block]:
    """JSON lines, many at a time. Raises Unreadable."""
    with _opened(path, layout, span=span) as source:
        yield from _split_lines(source, n_bytes=span.end - span.start if span else None)


@contextmanager
def _opened(path: Path, layout: Layout, *, span: Span | None) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked. Raises Unreadable."""
    with path.open("rb") as file:
        if span:
            file.seek(span.start)
            yield file
            return
        source = (
            cast(BinaryIO, io.BufferedReader(_Unpacked(file, layout), _CHUNK_BYTES)) if layout.gzip else file
        )
        _refuse_marks(source)
        yield source


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file, up to its limit. Raises Unreadable."""

    def __init__(self, file: BinaryIO, layout: Layout):
        self._file = GzipFile(fileobj=file)
        self._left = self._limit = layout.max_unpacked_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(min(len(buffer), _CHUNK_BYTES))
        except (OSError, EOFError, zlib.error) as error:
            raise Unreadable("unreadable", f"the file is not whole gzip: {error}", line=1) from None
        self._left -= len(data)
        if self._left < 0:
            message = f"unpacked, the file has more than the {self._limit} bytes allowed"
            raise Unreadable("too_large", message, line=1)
        buffer[: len(data)] = data
        return len(data)


def _refuse_marks(source: BinaryIO) -> None:
    head = cast(io.BufferedReader, source).peek(3)
    if head.startswith(b"\xef\xbb\xbf"):
        message = "the file starts with a byte order mark; save it as UTF-8 without one"
        raise Unreadable("encoding", message, line=1)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Unreadable("encoding", "the file is UTF-16; save it as UTF-8", line=1)


def split_file(path: Path, *, n_parts: int) -> list[Span]:
    """Parts of a file of lines, about equal, that begin and end with whole lines."""
    size = path.stat().st_size
    edges = [0]
    with path.open("rb") as file:
        _refuse_marks(file)
        for n in range(1, n_parts):
            file.seek(max(edges[-1], size * n // n_parts))
            while (data := file.readline(MAX_LINE_BYTES)) and not data.endswith(b"\n"):
                pass
            edges.append(file.tell())
    return [Span(start, end) for start, end in pairwise([*edges, size]) if end > start]


def _split_lines(source: BinaryIO, *, n_bytes: int | None = None) -> Iterator[Block]:
    first = 1
    left = sys.maxsize if n_bytes is None else n_bytes
    while left > 0 and (data := source.read(min(_BLOCK_BYTES, left))):
        left -= len(data)
        cut = not data.endswith(b"\n")
        if cut:  # only the last line of a block can be long
            rest = source.readline(MAX_LINE_BYTES)
            left -= len(rest)
            cut = len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n")
            data += rest
        lines: list[Record] = [*data.split(b"\n")]
        if data.endswith(b"\n"):
            lines.pop()
        if cut or len(cast(bytes, lines[-1])) >= MAX_LINE_BYTES:
            lines[-1] = RowFault("too_long", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
            data = b""
        while cut:
            rest = source.readline(MAX_LINE_BYTES)
            left -= len(rest)
            cut = bool(rest) and not rest.endswith(b"\n")
        yield Block(first, data, lines)
        first += len(lines)


def _starts_array(source: BinaryIO) -> bool:
    """Whether an array begins here, after white space at most; the other way to write .json is by lines."""
    return cast(io.BufferedReader, source).peek(_CHUNK_BYTES).lstrip()[:1] == b"["


def _split_array(source: BinaryIO) -> Iterator[tuple[int, Record]]:
    """The elements of one JSON array, told apart by its brackets, strings and commas alone."""
    buffer, line, start, position, depth, n_found = b"", 1, 0, 0, 0, 0
    while depth or not n_found:
        token = _STRUCTURE.search(buffer, position)
        if token is None or token[0] == b'"':
            position = (token.start() if token else len(buffer)) - start
            chunk = source.read(_CHUNK_BYTES)
            if not chunk:
                raise Unreadable("not_json", "the array does not end", line=line)
            buffer, start = buffer[start:] + chunk, 0
            if len(buffer) > MAX_LINE_BYTES + _CHUNK_BYTES:
                message = f"an element of the array is longer than {MAX_LINE_BYTES >> 20} MiB"
                raise Unreadable("too_long", message, line=line)
            continue
        position = token.end()
        if token[0] in (b"[", b"{"):
            depth += 1
            if depth == 1:
                line += buffer.count(b"\n", start, position)
                start = position
        elif token[0] in (b"]", b"}"):
            depth -= 1
        if (token[0] == b"," and depth == 1) or depth == 0:
            element, start = buffer[start : token.start()], position
            first = line + element.count(b"\n", 0, len(element) - len(element.lstrip()))
            line += element.count(b"\n")
            if element.strip():
                yield first, element
            elif depth or n_found:
                yield first, RowFault("not_json", "an element of the array is missing")
            n_found += 1
    while rest := buffer[start:].strip() or source.read(_CHUNK_BYTES):
        if rest.strip():
            raise Unreadable("not_json", "the file goes on after its array", line=line)
        buffer, start = b"", 0


class _TextLines:
    """The lines of a table as the csv module wants them; counts the bytes of one record, for it does not."""

    def __init__(self, source: BinaryIO):
        self._source = source
        self.record_bytes = 0
        self.count = 0

    def __iter__(self) -> "_TextLines":
        return self

    def __next__(self) -> str:
        data = self._source.readline(MAX_LINE_BYTES + 1)
        if not data:
            raise StopIteration
        self.count += 1
        self.record_bytes += len(data)
        if self.record_bytes > MAX_LINE_BYTES:
            message = f"a record is longer than {MAX_LINE_BYTES >> 20} MiB; is a quote not closed?"
            raise Unreadable("too_long", message, line=self.count)
        return data.decode(errors="surrogateescape")


def _read_table(source: BinaryIO, *, delimiter: str) -> Iterator[tuple[int, Record]]:
    """Rows as {column: cell} by the header, which is the first line that is not blank."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = _TextLines(source)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        lines.record_bytes = 0
        first = lines.count + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if header is None:
                raise Unreadable("unreadable", f"the header is not readable: {error}", line=first) from None
            yield first, RowFault("unreadable", f"the row is not readable: {error}")
            continue
        if cells is None:
            return
        if header is None:
            header = _check_header(cells, line=first) if cells else None
        else:
            yield first, _to_row(header, cells)


def _check_header(cells: list[str], *, line: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    _refuse_encoding(names, line=line)
    if not all(names) or len(set(names)) < len(names):
        message = "the first row must name the columns: each once, none without a name"
        raise Unreadable("columns", message, line=line)
    return names


def _refuse_encoding(names: list[str], *, line: int) -> None:
    fault = _encoding_fault(names)
    if fault:
        raise Unreadable(fault.code, str(fault), line=line)


def _to_row(header: list[str], cells: list[str]) -> Record:
    if not cells:
        return b""
    fault = _encoding_fault(cells)
    if fault:
        return fault
    if len(cells) != len(header):
        return RowFault("columns", f"the row has {len(cells)} cells, the header {len(header)}")
    return dict(zip(header, cells, strict=True))


def _encoding_fault(cells: list[str]) -> RowFault | None:
    text = "".join(cells)
    if "\0" in text:
        return RowFault("encoding", "the row holds a NUL byte")
    return RowFault("encoding", "the row is not UTF-8") if _NOT_UTF8.search(text) else None


def _read_parquet(path: Path, layout: Layout) -> Iterator[tuple[int, Record]]:
    with path.open("rb") as packed, TemporaryFile() as unpacked:
        if layout.gzip:  # its directory is at its end, which a stream cannot begin with
            shutil.copyfileobj(_Unpacked(packed, layout), unpacked, _CHUNK_BYTES)
            unpacked.seek(0)
        source = unpacked if layout.gzip else packed
        yield from read_table(source, limit_bytes=layout.max_unpacked_bytes, max_row_bytes=MAX_LINE_BYTES)
