"""The same rows out of every container, each fault on its line, and bombs refused in bounded memory."""

import csv
import gzip
import json
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from trainers.containers import MAX_LINE_BYTES, read_records
from trainers.layouts import CONTAINERS, Layout
from trainers.row_formats import AnyRow, Document, Pair, Prompt, Row
from trainers.rows import RowError, Rows, count_rows

GOOD = {"instruction": "Sum, please", "input": "1\n2", "output": 'It is "3"'}
OTHER = {"instruction": "Was heißt das?", "input": "", "output": "数据"}
ROWS = [GOOD, OTHER]
MEMORY_BYTES = 320 << 20


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


def test_a_text_that_parquet_stores_once_for_many_rows_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    once = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 200, pyarrow.int32()), ["x" * (8 << 20)])
    parquet.write_table(pyarrow.table({"text": once}), path, compression="zstd", store_schema=False)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom pyarrow import parquet\n"
        "from trainers.rows import Rows\nfrom trainers.specs import Layout\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = peak()\n"
        "print(sum(1 for _ in Rows(Path(sys.argv[1]), Layout('parquet'))), peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    rows, growth_mib = map(int, done.stdout.split())
    assert rows == 200
    assert growth_mib < 200


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
        "from trainers.rows import Rows\nfrom trainers.specs import Layout\n"
        "found = list(Rows(Path(sys.argv[1]), Layout.of(sys.argv[1], max_unpacked_bytes=512 << 20)))\n"
        "sys.exit(found[-1].code != 'too_large')"
    )

    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    done = subprocess.run(
        [sys.executable, "-c", code, path],
        preexec_fn=limit_memory,
        capture_output=True,
        text=True,
        check=False,
    )
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
