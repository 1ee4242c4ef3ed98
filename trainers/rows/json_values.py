"""JSON values as users write them: reading them, and naming what is wrong with them."""

import json
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from trainers.specs.faults import RowFault

_KEPT_CHARS = 512  # of keys, which may be of any length, whose comparison is remembered


def load_json(text: str, what: str, *, hint: str = "") -> Any:
    """The value of a JSON text. Raises ValueError that names `what` and the place of the fault."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowFault(
            "not_json", f"{what} is not JSON: {error.msg} at character {error.pos + 1}{hint}"
        ) from None
    except (RecursionError, ValueError):
        raise RowFault(
            "not_json", f"{what} is not JSON that can be read: too deep, or a number too long"
        ) from None


def check_json(value: Any, where: str) -> None:
    """Raises ValueError unless `value` can be written as JSON that a tokenizer takes."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (RecursionError, ValueError):
        raise RowFault(
            "not_json", f"{where}: NaN and Infinity are no JSON, nor is what is nested too deep"
        ) from None
    check_unicode(text, where)


def check_unicode(text: str, where: str) -> str:
    """`text`, which a tokenizer can take. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair; no tokenizer takes it
        raise RowFault("encoding", f"{where}: the text holds half of a surrogate pair") from None
    return text


def nearest(key: str, known: list[str]) -> str | None:
    """The known key that this one is a slip of: other case, a plural, a letter or two wrong."""
    if len(key) + sum(map(len, known)) <= _KEPT_CHARS:
        return _find_nearest(key, tuple(known))
    return _find_nearest.__wrapped__(key, tuple(known))


@lru_cache(maxsize=4096)  # the keys of one row are mostly those of the next
def _find_nearest(key: str, known: tuple[str, ...]) -> str | None:
    near = get_close_matches(key.lower(), known, n=1, cutoff=0.8)
    return near[0] if near else None


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def wrong_type(what: str, value: Any) -> RowFault:
    """The fault of a value that is of another type than `what` says, which null has a code of its own for."""
    return RowFault("null_value" if value is None else "wrong_type", f"{what}, not {type_name(value)}")
