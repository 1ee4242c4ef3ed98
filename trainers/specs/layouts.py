"""How a file of rows is to be read: what contains the rows, and what its owner says of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args

from trainers.specs.faults import SpecError

Container = Literal["jsonl", "json", "csv", "tsv", "parquet", "txt"]
CONTAINERS: tuple[str, ...] = get_args(Container)
DEFAULT_MAX_UNPACKED_BYTES = 4 << 30
PLAIN_TEXT = "plain_text"  # the format of .txt files: a line is a document

_ASKED = ("system", "system_prompt", "history")
_TOOLS = ("tools", "parallel_tool_calls")
# Every key that a row of a format may have. trainers.rows.formats reads them; a test compares the two.
FORMAT_KEYS: dict[str, tuple[str, ...]] = {
    "openai_preference": ("input", "preferred_output", "non_preferred_output"),
    "question_preference": ("question", "response_chosen", "response_rejected", *_ASKED),
    "preference": ("chosen", "rejected", "prompt", "conversations", "system", "system_prompt", *_TOOLS),
    "labelled": ("completion", "label", "prompt", "messages", *_TOOLS),
    "messages": ("messages", *_TOOLS),
    "prompt_messages": ("messages", *_TOOLS),
    "sharegpt": ("conversations", "system", "system_prompt", *_TOOLS),
    "alpaca": ("instruction", "output", "input", "system"),
    "prompt_completion": ("prompt", "completion"),
    "question": ("question", *_ASKED),
    "prompt": ("prompt", "system", "system_prompt", *_TOOLS),
    "text": ("text",),
}


@dataclass(frozen=True)
class Layout:
    """What contains the rows and how they are to be taken.

    format: the format of every row; None: each row tells by its keys.
    column_map: {our key: the key or column that the file has for it}.
    max_invalid_fraction: rows that may be refused and left out, as a part of all.
    max_unpacked_bytes: of a compressed file, what it may unpack to.
    """

    container: Container = "jsonl"
    gzip: bool = False
    format: str | None = None
    column_map: dict[str, str] = field(default_factory=dict)
    max_invalid_fraction: float = 0.0
    max_unpacked_bytes: int = DEFAULT_MAX_UNPACKED_BYTES

    @classmethod
    def of(
        cls,
        filename: str,
        format: str | None = None,
        column_map: dict[str, str] | None = None,
        *,
        max_invalid_fraction: float = 0.0,
        max_unpacked_bytes: int = DEFAULT_MAX_UNPACKED_BYTES,
    ) -> "Layout":
        """The layout of a file by its name. Raises SpecError for what cannot be read."""
        name = filename.lower()
        gzip = name.endswith(".gz")
        ending = name.removesuffix(".gz").rpartition(".")[2]
        container = next((known for known in get_args(Container) if known == ending and "." in name), None)
        if container is None:
            raise SpecError(
                f"the file's name must end with {', '.join(f'.{known}' for known in CONTAINERS)}, "
                "each also followed by .gz",
                param="file",
                code="unsupported_file_type",
            )
        _check_wishes(container, format, column_map or {})
        return cls(container, gzip, format, column_map or {}, max_invalid_fraction, max_unpacked_bytes)

    @classmethod
    def of_stored(
        cls,
        filename: str,
        *,
        format: str | None,
        column_map: dict[str, str] | None,
        max_invalid_fraction: float | None,
        max_unpacked_bytes: int = DEFAULT_MAX_UNPACKED_BYTES,
    ) -> "Layout":
        """The layout of a file that was taken: those of older versions had any name, and JSON lines."""
        try:
            return cls.of(
                filename,
                format,
                column_map,
                max_invalid_fraction=max_invalid_fraction or 0.0,
                max_unpacked_bytes=max_unpacked_bytes,
            )
        except SpecError:
            return cls(max_unpacked_bytes=max_unpacked_bytes)

    def name_facts(self) -> dict[str, Any]:
        """What decides which rows a file holds: a part of the name of what is made of them."""
        return {
            "container": self.container,
            "gzip": self.gzip,
            "format": self.format,
            "column_map": self.column_map,
            "tolerant": self.max_invalid_fraction > 0,
        }


def _check_wishes(container: str, format: str | None, column_map: dict[str, str]) -> None:
    if container == "txt":
        if format not in (None, PLAIN_TEXT):
            raise SpecError(f"a .txt file has rows of the format '{PLAIN_TEXT}'", param="format")
        if column_map:
            raise SpecError("a .txt file has no columns", param="column_map")
        return
    if format == PLAIN_TEXT:
        raise SpecError(f"'{PLAIN_TEXT}' is the format of .txt files", param="format")
    if format is not None and format not in FORMAT_KEYS:
        raise SpecError(f"unknown format '{format}'{_hint(format, FORMAT_KEYS)}", param="format")
    known = FORMAT_KEYS[format] if format else {key for keys in FORMAT_KEYS.values() for key in keys}
    for key in column_map:
        if key not in known:
            rows = f"rows of the format '{format}' have" if format else "rows have"
            raise SpecError(f"{rows} no key '{key}'{_hint(key, sorted(known))}", param="column_map")
    if any("\ud800" <= letter <= "\udfff" for column in column_map.values() for letter in column):
        raise SpecError("a column's name holds half of a surrogate pair", param="column_map")
    if len(set(column_map.values())) < len(column_map):
        raise SpecError("two keys are read from the same column", param="column_map")


def _hint(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(known)}"
