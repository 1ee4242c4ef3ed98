"""The same rows out of every container, each fault on its line, and bombs refused in bounded memory."""

import csv
import gzip
import json
import random
import sys
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.trainers.rows.measuring import measure, run_limited
from trainers.rows.containers import MAX_LINE_BYTES, read_records
from trainers.rows.files import RowError, Rows, count_rows
from trainers.rows.formats import AnyRow, Document, Pair, Prompt, Row
from trainers.rows.parquet import BOUNDED_ENV, DECODING_BYTES
from trainers.specs.layouts import CONTAINERS, Layout

GOOD = {"instruction": "Sum, please", "input": "1\n2", "output": 'It is "3"'}
OTHER = {"instruction": "Was heißt das?", "input": "", "output": "数据"}
ROWS = [GOOD, OTHER]
MEMORY_BYTES = 160 << 20
PARQUET_MEMORY_BYTES = 768 << 20


def as_table(rows: list[dict], delimiter: str) -> bytes:
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    target = BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), target)
    return target.getvalue()


WRITE: dict[str, Callable[[list[dict]], bytes]] = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "json": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "csv": lambda rows: as_table(rows, ","),
    "tsv": lambda rows: as_table(rows, "\t"),
    "parquet": as_parquet,
    "txt": lambda rows: "".join(row["output"] + "\n" for row in rows).encode(),
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[AnyRow | RowError]]:
    """What a file of this name and these bytes holds; that it is counted as it is read is checked, too."""

    def read(name: str, content: bytes, **wishes) -> list[AnyRow | RowError]:
        path = tmp_path / name
        path.write_bytes(content)
        rows = Rows(path, layout := Layout.of(name, **wishes))
        found = list(rows)
        assert rows.n_rows == count_rows(path, layout)
        assert rows.n_rows == sum(not (isinstance(row, RowError) and row.ends_file) for row in found)
        return found

    return read


def errors(found: list[AnyRow | RowError]) -> list[tuple[int, str]]:
    return [(row.line, row.code) for row in found if isinstance(row, RowError)]


def talks(found: list[AnyRow | RowError]) -> list[list[str]]:
    return [[m["content"] for m in row.messages] for row in found if isinstance(row, Row)]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_holds_the_same_rows(read, container: str, ending: str) -> None:
    content = WRITE[container](ROWS)
    found = read(f"rows.{container}{ending}", gzip.compress(content) if ending else content)
    if container == "txt":
        assert [row.text for row in found if isinstance(row, Document)] == ['It is "3"', "数据"]
    else:
        assert talks(found) == [["Sum, please\n1\n2", 'It is "3"'], ["Was heißt das?", "数据"]]
    assert errors(found) == []


def test_a_json_file_may_hold_lines(read) -> None:
    assert len(talks(read("rows.json", WRITE["jsonl"](ROWS)))) == 2


def test_an_array_names_the_line_of_each_element(read) -> None:
    text = (
        '\n[{"prompt": "a]", "completion": "\\"}"},\n\n {"prompt": 1,\n "completion": "b"},\n  nonsense, 7]\n'
    )
    found = read("rows.json", text.encode())
    assert (talks(found), errors(found)) == (
        [["a]", '"}']],
        [(4, "wrong_type"), (6, "not_json"), (6, "not_json")],
    )


@pytest.mark.parametrize(
    ("text", "found_errors"),
    [
        ("[]", [(1, "empty_file")]),
        ('[{"text": "a"}', [(1, "not_json")]),
        ('[{"text": "a"}\n] x', [(2, "not_json")]),
        ('[{"text": "a"},\n]', [(2, "not_json")]),
        ("[,]", [(1, "not_json"), (1, "not_json")]),
        ('[{"text": "a}]', [(1, "not_json")]),
    ],
)
def test_an_array_that_is_not_whole_is_reported(read, text: str, found_errors) -> None:
    assert errors(read("rows.json", text.encode())) == found_errors


def test_an_array_is_read_piece_by_piece(read) -> None:
    """Elements and strings that lie across the pieces."""
    rows = [{"text": 'x\\" [{' * size} for size in (1, 200_000, 3, 90_000, 5)]
    found = read("rows.json", json.dumps(rows).encode())
    assert [row.text for row in found if isinstance(row, Document)] == [row["text"] for row in rows]


def test_an_element_too_long_ends_the_reading(read) -> None:
    content = b'[{"text": "a"}, {"text": "' + b"x" * (MAX_LINE_BYTES + (2 << 20)) + b'"}]'
    assert errors(read("rows.json", content)) == [(1, "too_long")]


def test_a_table_names_the_line_where_a_row_begins(read) -> None:
    text = 'prompt,completion\n"two\nlines",yes\n\nQ,\nQ,A,B\n"Q"x,A\nQ,"A"\n"no end\n'
    found = read("rows.csv", text.encode())
    assert talks(found) == [["two\nlines", "yes"], ["Q", "A"]]
    assert errors(found) == [(5, "empty_value"), (6, "columns"), (7, "unreadable"), (9, "unreadable")]


def test_cells_hold_what_only_json_can_say(read) -> None:
    rows = [
        {"question": "Q2", "history": '[["Q1", "A1"]]', "response_chosen": "A", "response_rejected": "B"},
        {"question": "[1]", "history": "", "response_chosen": "A", "response_rejected": "B"},
        {"question": "Q", "history": "[", "response_chosen": "A", "response_rejected": "B"},
    ]
    first, second, third = read("rows.tsv", as_table(rows, "\t"))
    assert isinstance(first, Pair)
    assert [m["content"] for m in first.prompt] == ["Q1", "A1", "Q2"]
    assert isinstance(second, Pair)
    assert [m["content"] for m in second.prompt] == ["[1]"]
    assert errors([third]) == [(4, "not_json")]


def test_a_label_in_a_table_is_true_or_false(read) -> None:
    rows = read("rows.csv", b"prompt,completion,label\nQ,A,True\nQ,A,0\n")
    assert [row.label for row in rows if not isinstance(row, RowError | Row | Pair | Document | Prompt)] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("content", "found_errors"),
    [
        (b"", [(1, "empty_file")]),
        (b"\n\n", [(1, "empty_file")]),
        (b"prompt,completion\n", [(1, "empty_file")]),
        (b"prompt,prompt\na,b\n", [(1, "columns")]),
        (b"prompt,\na,b\n", [(1, "columns")]),
        (b'prompt,"completion"x\na,b\n', [(1, "unreadable")]),
        (b"prompt,completion\na,\xff\nb,\x00\n", [(2, "encoding"), (3, "encoding")]),
        (b"\xef\xbb\xbfprompt,completion\na,b\n", [(1, "encoding")]),
        ("prompt,completion\na,b\n".encode("utf-16"), [(1, "encoding")]),
        (b'prompt,completion\n"' + (b"x" * (1 << 20) + b"\n") * 17, [(17, "too_long")]),
    ],
    ids=range(10),
)
def test_a_table_that_cannot_be_read_says_why(read, content: bytes, found_errors) -> None:
    assert errors(read("rows.csv", content)) == found_errors


def test_the_rows_of_parquet_count_as_lines_and_may_hold_lists(read) -> None:
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    found = read("rows.parquet", as_parquet([{"messages": chat}, {"messages": []}, {"messages": chat}]))
    assert (talks(found), errors(found)) == ([["Q", "A"], ["Q", "A"]], [(2, "empty_value")])


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"use_dictionary": False},
        {"use_dictionary": False, "column_encoding": {"system": "DELTA_BYTE_ARRAY"}},
    ],
)
def test_parquet_of_several_row_groups_gives_each_row_as_it_was_written(tmp_path: Path, written: Any) -> None:
    draw = random.Random(1)

    def text() -> str | None:
        return None if draw.random() < 0.1 else draw.choice("ab") * draw.randint(0, 6) + str(draw.random())

    rows = [
        {
            "id": n,
            "system": text(),
            "messages": [{"role": text(), "content": text()} for _ in range(draw.randint(0, 4))],
        }
        for n in range(3000)
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700, **written)
    assert [row for _, row in read_records(path, Layout("parquet"))] == rows


def write_column(path: Path, texts: Any, **written: Any) -> Path:
    parquet.write_table(
        pyarrow.table({"text": texts}), path, compression="zstd", store_schema=False, **written
    )
    return path


def stored_once(text: str, times: int) -> Any:
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * times, pyarrow.int32()), [text])


PLAIN = {"use_dictionary": False}
DELTA = {**PLAIN, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
READ = """
from trainers.rows.files import RowError, Rows
from trainers.specs import Layout
import pyarrow.parquet
"""
COUNT = "print(sum(not isinstance(row, RowError) for row in Rows(Path(sys.argv[1]), Layout('parquet'))))"


@pytest.mark.parametrize(
    ("n_rows", "written", "limit_mib"),
    [(200, {}, 200), (64, {}, 200), (64, DELTA, 200), (64, PLAIN, 560)],  # Arrow has one page for the last
    ids=["stored once", "also", "as differences", "each"],
)
def test_long_rows_of_parquet_are_read_a_few_at_a_time(tmp_path, n_rows: int, written: Any, limit_mib: int):
    """Of 4 MiB each; they take almost no room on the disk."""
    text = "x" * (4 << 20)
    path = write_column(
        tmp_path / "a.parquet", [text] * n_rows if written else stored_once(text, n_rows), **written
    )
    assert path.stat().st_size < 40_000
    (n_read,), growth = measure(READ, COUNT, str(path))
    assert int(n_read) == n_rows
    assert growth < limit_mib << 20


def test_a_long_row_group_of_parquet_is_read_piece_by_piece(tmp_path: Path) -> None:
    """200 MB that cannot be packed, all different."""
    chance = random.Random(1)
    path = write_column(
        tmp_path / "a.parquet", [chance.randbytes(1000).hex() for _ in range(100_000)], **PLAIN
    )
    assert parquet.read_metadata(path).num_row_groups == 1
    (n_read,), growth = measure(READ, COUNT, str(path))
    assert int(n_read) == 100_000
    assert growth < 64 << 20


def lists_of(text: str, times: int) -> Any:
    """One row, whose list has the text so many times."""
    return pyarrow.ListArray.from_arrays(pyarrow.array([0, times], pyarrow.int32()), stored_once(text, times))


CELL_BYTES = 200_000_000


@pytest.mark.parametrize(
    ("make", "written", "rows", "errors"),
    [
        (lambda: ["x" * (4 << 20)] * 64, PLAIN, 64, []),
        (lambda: ["x" * CELL_BYTES], {}, 1, [(1, "too_long")]),
        (lambda: ["a", "x" * CELL_BYTES, "b"], {"row_group_size": 1}, 3, [(2, "too_long")]),
        (lambda: ["a", "x" * CELL_BYTES, "b"], {}, 0, [(1, "too_long")]),
        (lambda: ["a"] * 40 + ["x" * CELL_BYTES], {}, 41, [(41, "too_long")]),
        (lambda: lists_of("x" * (1 << 20), 20_000), {}, 0, [(1, "too_large")]),
    ],
    ids=["long rows", "long cell", "among others", "in their group", "hidden by others", "in a list"],
)
def test_parquet_is_checked_under_a_limit_on_memory(tmp_path, make, written: Any, rows: int, errors: Any):
    path, report = write_column(tmp_path / "a.parquet", make(), **written), tmp_path / "report.json"
    argv = [sys.executable, "-m", "trainers.validate", str(path), f"--report={report}"]
    done = run_limited(argv, data_bytes=PARQUET_MEMORY_BYTES)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_bytes())
    assert [(error["line"], error["code"]) for error in found["errors"]] == errors
    assert found["rows"] == rows


def test_a_row_of_parquet_that_swells_is_refused_without_a_limit_too(tmp_path: Path) -> None:
    """A file of 400 bytes whose only row has 20 GB."""
    path = write_column(tmp_path / "a.parquet", lists_of("x" * (1 << 20), 20_000))
    setup = f"import os\nos.environ.update({BOUNDED_ENV})\n{READ}"
    code = "print(*[row.code for row in Rows(Path(sys.argv[1]), Layout('parquet'))])"
    words, growth = measure(setup, code, str(path))
    assert words == ["too_large"]
    assert growth < DECODING_BYTES + (64 << 20)


@pytest.mark.parametrize(
    "content",
    [b"", b"PAR1", b"PAR1" * 100, as_parquet(ROWS)[:-9], b"{}\n"],
    ids=["empty", "mark", "marks", "cut", "json"],
)
def test_what_is_no_parquet_is_reported(read, content: bytes) -> None:
    assert errors(read("rows.parquet", content)) == [(1, "unreadable")]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"not gzip", "unreadable"),
        (gzip.compress(WRITE["jsonl"](ROWS))[:-9], "unreadable"),
        (gzip.compress(WRITE["jsonl"](ROWS)) + b"more", "unreadable"),
        (gzip.compress(b"\xef\xbb\xbf{}"), "encoding"),
        (b"", "empty_file"),
    ],
    ids=["no gzip", "cut", "more behind", "byte order mark", "empty"],
)
def test_what_is_no_gzip_is_reported(read, content: bytes, code: str) -> None:
    assert errors(read("rows.jsonl.gz", content))[-1][1] == code


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_unpacks_to_more_than_its_limit_is_refused(read, container: str) -> None:
    content = WRITE[container](ROWS)
    (found,) = read(f"r.{container}.gz", gzip.compress(content), max_unpacked_bytes=len(content) - 1)[-1:]
    assert errors([found])[0][1] == "too_large"


def test_a_bomb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(640):
            file.write(bytes(1 << 20))
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from trainers.rows.files import Rows\nfrom trainers.specs import Layout\n"
        "found = list(Rows(Path(sys.argv[1]), Layout.of(sys.argv[1], max_unpacked_bytes=512 << 20)))\n"
        "sys.exit(found[-1].code != 'too_large')"
    )

    done = run_limited([sys.executable, "-c", code, str(path)], data_bytes=MEMORY_BYTES)
    assert done.returncode == 0, done.stderr


def test_an_explicit_format_ends_the_guessing(read) -> None:
    row = {"prompt": "Q", "completion": "A", "label": True}
    content = WRITE["jsonl"]([row, {"text": "a"}])
    found = read("rows.jsonl", content, format="prompt_completion")
    assert (talks(found), errors(found)) == ([["Q", "A"]], [(2, "missing_key")])


def test_columns_are_read_under_our_names(read) -> None:
    rows = [
        {"Frage": "F", "question": "passed over", "gut": "G", "schlecht": "S"},
        {"Frge": "F", "gut": "G", "schlecht": "S"},
    ]
    names = {"question": "Frage", "response_chosen": "gut", "response_rejected": "schlecht"}
    first, second = read("rows.jsonl", WRITE["jsonl"](rows), column_map=names)
    assert isinstance(first, Pair)
    assert [m["content"] for m in [*first.prompt, first.chosen, first.rejected]] == ["F", "G", "S"]
    assert isinstance(second, RowError)
    assert second.message == "'Frage', which column_map has for 'question', is missing; is it 'Frge'?"


def test_a_column_is_not_found_under_its_old_name_too(read) -> None:
    (row,) = read("rows.jsonl", b'{"prompt": "It is only a text."}', column_map={"text": "prompt"})
    assert isinstance(row, Document)


def test_columns_may_change_places(read) -> None:
    swap = {"chosen": "rejected", "rejected": "chosen"}
    (row,) = read("r.csv", b"prompt,chosen,rejected\nQ,bad,good\n", column_map=swap)
    assert (row.chosen["content"], row.rejected["content"]) == ("good", "bad")
