"""Digests that travel with a file: `Repr-Digest` of RFC 9530, of which SHA-256 is read."""

import base64
import binascii
import re

from api.errors import ApiError

HEADER = "Repr-Digest"
_SHA_256 = re.compile(r"(?:^|,)[ \t]*sha-256[ \t]*=[ \t]*([^,]*)")
_BYTES = re.compile(r":([A-Za-z0-9+/]{43}=):[ \t]*")


def write(sha256: str) -> str:
    """The value of the header for a digest in hexadecimal."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def read(value: str) -> str | None:
    """The SHA-256 of a header in hexadecimal; None when it names only others. Raises ApiError (400)."""
    found = _SHA_256.search(value)
    if found is None:
        return None
    encoded = _BYTES.fullmatch(found[1])
    if encoded is None:
        raise ApiError(400, "invalid_value", "A SHA-256 is written sha-256=:BASE64:.", param=HEADER)
    return binascii.a2b_base64(encoded[1]).hex()
