"""Identifiers as clients expect them: a prefix that says what it is, then random letters and digits."""

import secrets
import string

_ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str, *, length: int = 24) -> str:
    """`prefix` followed by `length` random base-62 characters."""
    return prefix + random_text(length)


def random_text(length: int) -> str:
    """`length` random base-62 characters from the system's source."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
