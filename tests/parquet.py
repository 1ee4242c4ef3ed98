"""A Parquet file over which Arrow ends its process: an error of C++ that nothing catches."""

from io import BytesIO

import pyarrow
from pyarrow import parquet

_NAME = b"\x18\x0acompletion"  # as it stands in the metadata
_OPTIONAL, _UNKNOWN = b"\x25\x02", b"\x25\x2c"  # how often the column has a value in a row


def write_crashing() -> bytes:
    """Rows of prompts, and of completions that are had in an unknown way: their statistics do not fit it."""
    target = BytesIO()
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), target)
    whole = target.getvalue()
    assert whole.count(_OPTIONAL + _NAME) == 1
    return whole.replace(_OPTIONAL + _NAME, _UNKNOWN + _NAME)
