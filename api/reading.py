"""What is said of the rows of a training file when it is uploaded, as form fields or in the query."""

import json
import re
from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel

from api.errors import ApiError
from trainers.specs import Layout
from trainers.specs.layouts import FORMAT_KEYS, PLAIN_TEXT

FIELDS = ("format", "column_map", "max_invalid_fraction")
_COLUMN = re.compile(r"column_map\[(.+)\]")  # how the official clients write an object
PROPERTIES: dict[str, Any] = {
    "format": {"type": "string", "enum": [*FORMAT_KEYS, PLAIN_TEXT]},
    "column_map": {
        "type": "object",
        "additionalProperties": {"type": "string"},
        "description": "The file's own names for keys of rows: {key: column}.",
    },
    "max_invalid_fraction": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
}


class Said(BaseModel):
    """The same in a query, each as text."""

    format: Annotated[str | None, Query(description="The format of every row.")] = None
    column_map: Annotated[str | None, Query(description='A JSON object: {"our key": "your column"}.')] = None
    max_invalid_fraction: Annotated[
        str | None, Query(description="Rows that may be wrong and are left out, as a part of all.")
    ] = None


def names_column(field: str) -> bool:
    """Whether a field is an entry of `column_map`."""
    return _COLUMN.fullmatch(field) is not None


def read(fields: dict[str, str], *, filename: str, purpose: str) -> dict[str, Any]:
    """What is said of the rows, as `files.create` takes it. Raises ApiError, SpecError."""
    said = {
        "format": fields.get("format"),
        "column_map": _read_column_map(fields),
        "max_invalid_fraction": _read_fraction(fields),
    }
    if purpose == "fine-tune":
        Layout.of(filename, said["format"], said["column_map"])
        return said
    given = next((name for name, value in said.items() if value is not None), None)
    if given is not None:
        message = f"'{given}' is said of files with the purpose 'fine-tune' only."
        raise ApiError(400, "invalid_value", message, param=given)
    return said


def _read_fraction(fields: dict[str, str]) -> float | None:
    text = fields.get("max_invalid_fraction")
    if text is None:
        return None
    if not re.fullmatch(r"0|0?\.[0-9]{1,9}", text):
        message = "'max_invalid_fraction' must be a number from 0 up to 1, which is left out: 0.01."
        raise ApiError(400, "invalid_value", message, param="max_invalid_fraction")
    return float(text)


def _read_column_map(fields: dict[str, str]) -> dict[str, str] | None:
    """`column_map` as one JSON object, or as a field a key: `column_map[question]`."""
    named = {found[1]: value for name, value in fields.items() if (found := _COLUMN.fullmatch(name))}
    text = fields.get("column_map")
    if text is None:
        return named or None
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not all(isinstance(column, str) for column in given.values()) or named:
        message = '\'column_map\' must be an object of texts: {"our key": "your column"}.'
        raise ApiError(400, "invalid_value", message, param="column_map")
    return given or None
