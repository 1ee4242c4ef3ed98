"""What is wrong with a row or a wish, by a code that stays the same while the words may change."""

from typing import Literal

Reason = Literal[
    "columns",  # a table whose header is of no use, or a row with other columns than the header's
    "empty_file",
    "empty_value",
    "encoding",  # no UTF-8, a byte order mark, a NUL, half of a surrogate pair
    "invalid_value",  # of a known key, for a reason that has no code of its own
    "missing_key",
    "mixed_format",
    "not_json",
    "null_value",
    "odd_last_turn",
    "role_order",
    "same_answers",
    "too_large",  # unpacked, the file exceeds its limit
    "too_long",
    "tools",
    "unknown_format",
    "unknown_key",
    "unknown_role",
    "unreadable",  # the file is not what its name says
    "unsupported_key",
    "wrong_type",
]


class RowFault(ValueError):
    """A row that cannot be used."""

    def __init__(self, code: Reason, message: str):
        super().__init__(message)
        self.code: Reason = code


class Unreadable(RowFault):
    """A fault after which nothing more of a file can be read; lines count from 1."""

    def __init__(self, code: Reason, message: str, *, line: int):
        super().__init__(code, message)
        self.line = line


class SpecError(ValueError):
    """A wish that cannot be granted; `param` is its dotted path in the request."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


def reason_of(error: ValueError) -> Reason:
    """The code of what was raised about a row."""
    return error.code if isinstance(error, RowFault) else "invalid_value"
