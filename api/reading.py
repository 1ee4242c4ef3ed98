"""What is said of the rows of a training file on its way in, in a form, a query or a JSON body."""

import json
import re
from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel, WithJsonSchema

from api.errors import ApiError
from api.schemas.common import Body
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


class Told(Body):
    """The same in a JSON body; refused in the same words, so `check` looks at it."""

    format: Annotated[str, WithJsonSchema(PROPERTIES["format"])] | None = None
    column_map: Annotated[Any, WithJsonSchema(PROPERTIES["column_map"])] | None = None
    max_invalid_fraction: Annotated[Any, WithJsonSchema(PROPERTIES["max_invalid_fraction"])] | None = None


def names_column(field: str) -> bool:
    """Whether a field is an entry of `column_map`."""
    return _COLUMN.fullmatch(field) is not None


def read(fields: dict[str, str], *, filename: str, purpose: str) -> dict[str, Any]:
    """What fields of a form or a query say of the rows, as `check` answers it. Raises ApiError, SpecError."""
    fraction = fields.get("max_invalid_fraction")
    if fraction is not None and re.fullmatch(r"0|0?\.[0-9]{1,9}", fraction):
        fraction = float(fraction)
    said = {
        "format": fields.get("format"),
        "column_map": _read_column_map(fields),
        "max_invalid_fraction": fraction,
    }
    return check(said, filename=filename, purpose=purpose)


def check(said: dict[str, Any], *, filename: str, purpose: str) -> dict[str, Any]:
    """What `said` says of the rows, as `files.create` takes it. Raises ApiError, SpecError."""
    said = {name: said[name] for name in FIELDS}
    _check_column_map(said["column_map"])
    _check_fraction(said["max_invalid_fraction"])
    said["column_map"] = said["column_map"] or None
    if purpose == "fine-tune":
        Layout.of(filename, said["format"], said["column_map"])
        return said
    given = next((name for name, value in said.items() if value is not None), None)
    if given is not None:
        message = f"'{given}' is said of files with the purpose 'fine-tune' only."
        raise ApiError(400, "invalid_value", message, param=given)
    return said


def _check_fraction(given: Any) -> None:
    if given is None or (type(given) in (int, float) and 0 <= given < 1):
        return
    message = "'max_invalid_fraction' must be a number from 0 up to 1, which is left out: 0.01."
    raise ApiError(400, "invalid_value", message, param="max_invalid_fraction")


def _check_column_map(given: Any) -> None:
    if given is None or (isinstance(given, dict) and all(isinstance(name, str) for name in given.values())):
        return
    message = '\'column_map\' must be an object of texts: {"our key": "your column"}.'
    raise ApiError(400, "invalid_value", message, param="column_map")


def _read_column_map(fields: dict[str, str]) -> Any:
    """`column_map` as one JSON object, or as a field a key: `column_map[question]`; else the text itself."""
    named = {found[1]: value for name, value in fields.items() if (found := _COLUMN.fullmatch(name))}
    text = fields.get("column_map")
    if text is None:
        return named or None
    if named:
        return text
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if given is None else given
