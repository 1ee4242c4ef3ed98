"""Whatever a file holds becomes rows and reports: nothing else is raised, no row goes without a word."""

import gzip
import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from api.schemas.reports import FileReport
from trainers.rows.files import RowError, Rows, count_rows
from trainers.specs.layouts import CONTAINERS, FORMAT_KEYS, Layout
from trainers.validate import check_file

KEYS = sorted(
    {key for keys in FORMAT_KEYS.values() for key in keys} | {"role", "content", "from", "value", "x"}
)
TEXTS = st.one_of(
    st.text(max_size=6), st.sampled_from(["user", "assistant", "human", "gpt", "\ud800", "[", "{}"])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXTS}),
    max_size=4,
)
ROWS = st.lists(
    st.one_of(
        VALUES,
        st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5),
        st.fixed_dictionaries({"messages": MESSAGES}),
        st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}),
    ),
    max_size=6,
)
# Files that are nearly right: pieces of right ones, in any order and cut anywhere.
SIGNS = [bytes([sign]) for sign in b'[]{},\n\r"\\\t\0\xff a']
WORDS = [b'{"prompt": "a", "completion": "b"}', b"prompt,completion", b'"a"', b"\xef\xbb\xbf"]
PIECES = st.lists(st.sampled_from([*SIGNS, *WORDS]), max_size=24).map(b"".join)
BYTES = st.one_of(st.binary(max_size=64), PIECES, ROWS.map(lambda rows: json.dumps(rows).encode()))
LAYOUTS = st.builds(
    Layout,
    container=st.sampled_from(CONTAINERS),
    gzip=st.booleans(),
    format=st.one_of(st.none(), st.sampled_from(sorted(FORMAT_KEYS))),
    column_map=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(KEYS), max_size=2),
    max_unpacked_bytes=st.sampled_from([4, 1 << 20]),
)
MANY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows"


def without(report: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in report.items() if k != key}


def check_all_is_told(path: Path, layout: Layout) -> dict[str, Any]:
    rows = Rows(path, layout)
    found = list(rows)
    reported = sum(isinstance(row, RowError) and not row.ends_file for row in found)
    used = sum(not isinstance(row, RowError) for row in found)
    assert used + reported == rows.n_rows == count_rows(path, layout)
    assert found, "neither a row nor a word"
    assert all(not isinstance(row, RowError) or not row.ends_file for row in found[:-1])
    report = check_file(path, layout)
    assert (report["rows"], report["rows_used"], report["rows_refused"]) == (rows.n_rows, used, reported)
    assert sum(report["reasons"].values()) == reported + (not report["whole"])
    json.dumps(report, ensure_ascii=False).encode()
    sent = FileReport.model_validate({"file_id": "file-a"} | json.loads(json.dumps(report))).model_dump_json()
    assert json.loads(sent) == {"object": "file.report", "file_id": "file-a"} | without(report, "sha256")
    return report


@MANY
@given(content=BYTES, layout=LAYOUTS)
def test_any_bytes_are_read_as_rows_and_reports(path: Path, content: bytes, layout: Layout) -> None:
    path.write_bytes(content)
    check_all_is_told(path, layout)


@MANY
@given(content=BYTES, layout=LAYOUTS, cut=st.integers(0, 100), garbage=st.binary(max_size=8))
def test_gzip_whole_or_broken_is_read_as_rows_and_reports(
    path: Path, content: bytes, layout: Layout, cut: int, garbage: bytes
) -> None:
    packed = gzip.compress(content, mtime=0)
    layout = replace(layout, gzip=True)
    for damaged in (packed, packed[:cut], packed[:cut] + garbage + packed[cut + len(garbage) :]):
        path.write_bytes(damaged)
        check_all_is_told(path, layout)


@MANY
@given(rows=ROWS, indent=st.sampled_from([None, 1]))
def test_every_element_of_an_array_is_a_row(path: Path, rows: list[Any], indent: int | None) -> None:
    path.write_bytes(json.dumps(rows, indent=indent).encode())
    report = check_all_is_told(path, Layout("json"))
    assert (report["rows"], report["whole"]) == (len(rows), bool(rows))


@MANY
@given(rows=ROWS)
def test_a_line_and_an_element_are_read_alike(path: Path, rows: list[Any]) -> None:
    path.write_bytes(json.dumps(rows).encode())
    in_array = check_all_is_told(path, Layout("json"))
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    in_lines = check_all_is_told(path, Layout())
    for told in ("rows", "rows_used", "format", "reasons"):
        assert in_array[told] == in_lines[told]


COLUMNS = st.dictionaries(
    st.sampled_from(KEYS),
    st.lists(st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=5)), min_size=3, max_size=3),
    min_size=1,
    max_size=4,
)


@MANY
@given(columns=COLUMNS, cut=st.integers(0, 400), garbage=st.binary(max_size=8))
def test_parquet_whole_or_broken_is_read_as_rows_and_reports(
    path: Path, columns: dict[str, list[str | None]], cut: int, garbage: bytes
) -> None:
    target = BytesIO()
    parquet.write_table(
        pyarrow.table({k: pyarrow.array(v, pyarrow.string()) for k, v in columns.items()}), target
    )
    whole = target.getvalue()
    path.write_bytes(whole)
    assert check_all_is_told(path, Layout("parquet"))["rows"] == 3
    # Before the footer: of broken metadata Arrow may abort this process (test_reader_crashes.py).
    n_body = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    at = cut % n_body
    garbage = garbage[: n_body - at]
    path.write_bytes(whole[:at] + garbage + whole[at + len(garbage) :])
    check_all_is_told(path, Layout("parquet"))
