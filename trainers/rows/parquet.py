"""The rows of Parquet files, decoded in bounded memory: what such a file says of its size need not be so."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainers.specs.faults import RowFault, Unreadable

DECODING_BYTES = 1 << 30  # that the process may grow by while a batch is decoded: a page, and copies of it
_BATCH_ROWS = 64
_WARY_ROWS = 4  # of a batch whose rows may be far longer than the file says
_BATCH_BYTES = 32 << 20
_BUFFER_BYTES = 1 << 20
_AS_THEY_ARE = {"PLAIN", "RLE", "BIT_PACKED", "BYTE_STREAM_SPLIT"}
_OVERHEAD_BYTES = 1 << 20  # of a row: how its lists are told apart, and the like
_LONG = "the row is longer than {} MiB"
_TOO_LARGE = "unpacked, the file has more than the {} bytes allowed"
_PAGE_BYTES = resource.getpagesize()
# Of a process that is to read in bounded memory, set before it imports Arrow.
BOUNDED_ENV = {"ARROW_DEFAULT_MEMORY_POOL": "system"}


def read_table(file: Any, *, limit_bytes: int, max_row_bytes: int) -> Iterator[tuple[int, Any]]:
    """(row, counted from 1; its columns, or RowFault where it is too long). Raises Unreadable.

    limit_bytes: of all rows together.
    """
    import pyarrow

    row, left = 0, limit_bytes
    long = RowFault("too_long", _LONG.format(max_row_bytes >> 20))
    try:
        for batch in _decode(file, limit_bytes=limit_bytes, max_row_bytes=max_row_bytes):
            if isinstance(batch, RowFault):
                row += 1
                yield row, batch
                continue
            may_be_long = batch.nbytes > max_row_bytes
            for i in range(batch.num_rows):
                row += 1
                one = batch.slice(i, 1)
                n_bytes = one.nbytes if may_be_long else 0
                is_long = n_bytes > max_row_bytes
                record = None if is_long else one.to_pylist()[0]
                left -= n_bytes if is_long else _count_chars(record)
                if left < 0:
                    raise Unreadable("too_large", _TOO_LARGE.format(limit_bytes), line=row)
                yield row, long if is_long else record
    except Unreadable:
        raise
    except MemoryError:
        message = f"the rows from here on take more than {DECODING_BYTES >> 20} MiB to decode; "
        raise Unreadable(
            "too_large", message + "write shorter ones, or fewer to a page", line=row + 1
        ) from None
    # Whatever arrow stumbles over is in the file: what it raises has no class in common.
    except (pyarrow.ArrowException, ArithmeticError, LookupError, OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unreadable("unreadable", f"the file is not whole Parquet: {first}", line=row + 1) from None


def _decode(file: Any, *, limit_bytes: int, max_row_bytes: int) -> Iterator[Any]:
    """The batches of a file, and a RowFault in place of a single row that is too long. Raises Unreadable."""
    from pyarrow import parquet

    found = parquet.read_metadata(file)
    groups = [found.row_group(i) for i in range(found.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > limit_bytes:
        raise Unreadable("too_large", _TOO_LARGE.format(limit_bytes), line=1)
    # Without a buffer the whole of a column's part in a row group would be read at once.
    table = parquet.ParquetFile(file, metadata=found, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    n_before = 0
    for number, group in enumerate(groups):
        # More than all of its rows may have, so that one of them is too long, and need not be decoded.
        if group.total_byte_size > group.num_rows * (max_row_bytes + _OVERHEAD_BYTES) > 0:
            fault = RowFault("too_long", _LONG.format(max_row_bytes >> 20))
            if group.num_rows > 1:
                raise Unreadable(fault.code, f"of the next {group.num_rows} rows, {fault}", line=n_before + 1)
            yield fault
        else:
            yield from _bound(
                table.iter_batches(_count_batch_rows(group), row_groups=[number], use_threads=False)
            )
        n_before += group.num_rows


def _bound(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; MemoryError for one that takes more than DECODING_BYTES to decode."""
    while True:
        with _growing_by(DECODING_BYTES):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _count_batch_rows(group: Any) -> int:
    """How many rows of a row group are decoded at once, by what the file says of their size.

    Where a text is stored once for many rows, or as what it differs in from another, any row may be as long
    as all that is stored: such rows come a few at a time.
    """
    chunks = [group.column(i) for i in range(group.num_columns)]
    may_swell = any(
        chunk.physical_type == "BYTE_ARRAY"
        and not _AS_THEY_ARE.issuperset(chunk.encodings)
        and chunk.total_uncompressed_size * _BATCH_ROWS > _BATCH_BYTES
        for chunk in chunks
    )
    usual = _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)
    return max(1, min(_WARY_ROWS if may_swell else _BATCH_ROWS, usual))


@contextmanager
def _growing_by(n_bytes: int) -> Iterator[None]:
    """Allocating more than so many bytes is a MemoryError, unless Arrow's memory does not come from malloc:
    its own allocators take a GiB at a time, and end the process when they cannot.
    """
    import pyarrow

    if pyarrow.default_memory_pool().backend_name != "system":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    wanted = pages * _PAGE_BYTES + n_bytes
    limits = [limit for limit in (wanted, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _count_chars(value: Any) -> int:
    """Of all texts in a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_count_chars, value.values()))
    return sum(map(_count_chars, value)) if isinstance(value, list) else 0
