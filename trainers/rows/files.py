"""Training files, read row by row in bounded memory: rows in any known format, or plain text."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from trainers.rows.containers import Block, Record, Span, read_blocks, read_records
from trainers.rows.formats import (
    FORMATS,
    AnyRow,
    Document,
    RowKind,
    detect_format,
    kind_of,
    read_row,
    refuse_slips,
)
from trainers.rows.json_values import load_json
from trainers.rows.plain import PlainCheck, make_check
from trainers.specs.faults import Reason, RowFault, Unreadable, reason_of
from trainers.specs.layouts import PLAIN_TEXT, Layout

# What a cell of a table can only hold as JSON.
_JSON_CELLS = ("messages", "conversations", "history", "tools", "input")
_MESSAGE_CHARS = 500
_ASKED_ROWS = 100  # say whether a file that begins with an unanswered conversation is one of prompts
MAX_ROWS = 20_000_000  # each costs some bytes of memory when a file is checked and prepared
# Given lines and the number of the first; which of them are to be read all the same, counted from 0.
TakePlain = Callable[[list[bytes], int], list[int]]
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class RowError:
    """What is wrong with a line, counted from 1, or with the file from there on."""

    line: int
    message: str
    code: Reason = "invalid_value"
    ends_file: bool = False  # no row: the rest of the file was not read


class Rows:
    """Reads a file row by row: each item is a row or the RowError of that line.

    Each line of a .txt file is a document. Otherwise the layout's format is that of every row, or else the
    first valid row decides it; a conversation without its answer is a row of prompts only where those after
    it, up to a hundred, are mostly not answered either. Counts are complete once the iteration has ended.
    """

    def __init__(
        self, path: Path, layout: Layout, *, span: Span | None = None, format: str | None = None
    ) -> None:
        """span: a part of a file of lines. format: that of the rows before it."""
        self._path, self._layout, self._span = path, layout, span
        self.format: str | None = format or (PLAIN_TEXT if layout.container == "txt" else layout.format)
        self.n_rows = 0  # rows that hold something, valid or not
        self.blank_lines = 0
        self.record: Record = b""  # what the last item was read from

    def __iter__(self) -> Iterator[AnyRow | RowError]:
        return self._to_the_end(
            item
            for line, record in read_records(self._path, self._layout, span=self._span)
            for item in self._take(line, record)
        )

    def skim(self, take_plain: TakePlain) -> Iterator[AnyRow | RowError]:
        """As an iteration, but lines that are good rows beyond doubt go to `take_plain`, and only those that
        it asks for are read. They are most lines of most files, and a reading costs ten times as much.
        """
        return self._to_the_end(self._skim(take_plain))

    def _to_the_end(self, items: Iterator[AnyRow | RowError]) -> Iterator[AnyRow | RowError]:
        """What `items` has, and at the end what is wrong with the file as a whole."""
        try:
            yield from items
        except Unreadable as error:
            yield RowError(error.line, _shorten(str(error)), error.code, ends_file=True)
            return
        if self.n_rows == 0 and not self._span:
            message = "the file holds no rows" if self.blank_lines else "the file is empty"
            yield RowError(1, message, "empty_file", ends_file=True)

    def _skim(self, take_plain: TakePlain) -> Iterator[AnyRow | RowError]:
        check: PlainCheck | None = None
        for block in self._read_blocks():
            first, records = block.first, block.records
            fits = not is_too_many(self._n_read + len(records))
            if check and fits and check.takes_all(records, data=block.data):
                wanted = take_plain(records, first)
                self.n_rows += len(records) - len(wanted)
                for i in wanted:
                    yield from self._take(first + i, records[i])
                continue
            for line, record in enumerate(records, first):
                check = check or self._make_plain_check()
                fits = not is_too_many(self._n_read + 1)
                if check and fits and isinstance(record, bytes) and check.takes(record):
                    if not take_plain([record], line):
                        self.n_rows += 1
                        continue
                yield from self._take(line, record)

    def _read_blocks(self) -> Iterator[Block]:
        if self._layout.container == "jsonl":
            return read_blocks(self._path, self._layout, span=self._span)
        return (Block(line, b"", [record]) for line, record in read_records(self._path, self._layout))

    def _take(self, line: int, record: Record) -> Iterator[AnyRow | RowError]:
        """The row or what is wrong with it; nothing of a blank line."""
        if is_too_many(self._n_read + 1):
            message = f"the file has more than {MAX_ROWS} rows and blank lines"
            raise Unreadable("too_large", message, line=line)
        if isinstance(record, bytes) and (not record or record.isspace()):
            self.blank_lines += 1
            return
        self.n_rows += 1
        self.record = record
        try:
            yield self._read(record, line=line)
        except ValueError as error:
            yield RowError(line, _shorten(str(error)), reason_of(error))

    @property
    def _n_read(self) -> int:
        """Rows and blank lines so far: elements of an array may all be on one line."""
        return self.n_rows + self.blank_lines

    @property
    def kind(self) -> RowKind | None:
        """What the rows are to a method; None before the first valid one."""
        return kind_of(self.format) if self.format else None

    def _make_plain_check(self) -> PlainCheck | None:
        if self._layout.container not in ("jsonl", "json") or self._layout.column_map or not self.format:
            return None
        return make_check(self.format)

    def _read(self, record: Record, *, line: int) -> AnyRow:
        if self.format == PLAIN_TEXT and not isinstance(record, RowFault):
            assert isinstance(record, bytes)
            return Document(line, _decode(record).rstrip("\r\n"))
        row = self._to_object(record, first=line == 1 and (self._span is None or self._span.start == 0))
        name = self._layout.format or self._detect(row)
        read = read_row(row, name, line=line)
        if name == "prompt_messages" and not self.format and self._most_are_answered():
            self.format = "messages"
            return read_row(row, self.format, line=line)
        self.format = name
        return read

    def _to_object(self, record: Record, *, first: bool) -> dict[str, Any]:
        """The row under our names."""
        if isinstance(record, RowFault):
            raise record
        row = _parse(_decode(record), first=first) if isinstance(record, bytes) else record
        if self._layout.column_map:
            row = _rename(row, self._layout.column_map)
        return _read_cells(row) if self._layout.container in ("csv", "tsv") else row

    def _most_are_answered(self) -> bool:
        """Of the conversations from this first one on; if so, it has lost its answer and is no prompt."""
        balance = 0
        records = read_records(self._path, self._layout, span=self._span)
        held = (record for _, record in records if record != b"")
        with contextlib.suppress(Unreadable):  # told when the iteration comes to it
            for record in islice(held, self.n_rows + _ASKED_ROWS - 1):
                with contextlib.suppress(ValueError):
                    row = self._to_object(record, first=False)
                    name = detect_format(row)
                    read_row(row, name, line=1)
                    balance += {"messages": 1, "prompt_messages": -1}.get(name, 0)
        return balance > 0

    def _detect(self, row: dict[str, Any]) -> str:
        # Among conversations, one that ends with a question is a fault and no prompt.
        name = "messages" if self.format == "messages" and "messages" in row else detect_format(row)
        if self.format and {name, self.format} == {"messages", "prompt_messages"}:
            name = self.format  # the first rows have said whether answers are wanted
        if self.format and name != self.format:
            refuse_slips(row, FORMATS[self.format])
            looks, wanted = FORMATS[name].looks, FORMATS[self.format].looks
            raise RowFault("mixed_format", f"this row is {looks}, but the rows before it are {wanted}")
        return name


def is_too_many(n_lines: int) -> bool:
    """Whether a file may not have so many rows and blank lines."""
    return n_lines > MAX_ROWS


def count_rows(path: Path, layout: Layout) -> int:
    """How many rows a file holds, valid or not."""
    n_rows = 0
    with contextlib.suppress(Unreadable):  # told to whoever reads the rows
        for _, record in read_records(path, layout):
            n_rows += record != b""
    return n_rows


def _shorten(message: str) -> str:
    """It may quote a key of any length, and what neither JSON nor a database takes."""
    message = message.encode(errors="backslashreplace").decode().replace("\0", "\\0")
    return message if len(message) <= _MESSAGE_CHARS else message[: _MESSAGE_CHARS - 1] + "…"


def _decode(data: bytes) -> str:
    if b"\0" in data:
        raise RowFault("encoding", "the line holds a NUL byte")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RowFault("encoding", f"the line is not UTF-8 (byte {error.start + 1})") from None


def _parse(text: str, *, first: bool) -> dict[str, Any]:
    hint = "; JSONL has one whole object a line" if first and text.lstrip()[:1] in ("[", "{") else ""
    row = load_json(text, "the line", hint=hint)
    if isinstance(row, list):
        raise RowFault("not_json", "the line is a JSON array; JSONL has one object a line")
    if not isinstance(row, dict):
        raise RowFault("not_json", "the line is not a JSON object")
    return row


def _rename(row: dict[str, Any], column_map: dict[str, str]) -> dict[str, Any]:
    """The row under our names; what it had under them otherwise is left out, as its owner has said."""
    for key, column in column_map.items():
        if column not in row:
            near = get_close_matches(column, list(row), n=1)
            hint = f"; is it {near[0]!r}?" if near else ""
            raise RowFault("missing_key", f"{column!r}, which column_map has for {key!r}, is missing{hint}")
    kept = {k: v for k, v in row.items() if k not in column_map.values()}
    return kept | {key: row[column] for key, column in column_map.items()}


def _read_cells(row: dict[str, str]) -> dict[str, Any]:
    """The cells of a table's row as JSON would have them: an empty one of these keys is none at all."""
    read: dict[str, Any] = dict(row)
    for key in _JSON_CELLS:
        cell = row.get(key, "").strip()
        if key in row and not cell:
            del read[key]
        elif cell.startswith(("[", "{")) and (key != "input" or "instruction" not in row):
            read[key] = load_json(cell, f"{key!r}")
    if "label" in row:
        read["label"] = _BOOLEANS.get(row["label"].strip().lower(), row["label"])
    return read
