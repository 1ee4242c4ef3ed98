"""How a file is read is told by its name and by what its owner says of it."""

import pytest

from trainers.rows.formats import FORMATS
from trainers.specs import SpecError
from trainers.specs.layouts import FORMAT_KEYS, Layout


def test_the_keys_that_the_api_knows_are_those_that_are_read() -> None:
    assert {name: set(keys) for name, keys in FORMAT_KEYS.items()} == {
        name: {*known.required, *known.optional} for name, known in FORMATS.items()
    }


@pytest.mark.parametrize(
    ("name", "container", "gzip"),
    [
        ("rows.jsonl", "jsonl", False),
        ("a.b.JSON", "json", False),
        ("t.csv.gz", "csv", True),
        ("t.TSV.GZ", "tsv", True),
        ("t.parquet", "parquet", False),
        ("book.txt", "txt", False),
    ],
)
def test_the_ending_of_the_name_tells_what_is_in_a_file(name: str, container: str, gzip: bool) -> None:
    layout = Layout.of(name)
    assert (layout.container, layout.gzip) == (container, gzip)


@pytest.mark.parametrize("name", ["rows", "jsonl", "rows.gz", "rows.jsonl.zip", "rows.jsonl.gz.gz", ""])
def test_other_endings_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(SpecError, match=r"\.jsonl, \.json, \.csv, \.tsv, \.parquet, \.txt") as refused:
        Layout.of(name)
    assert (refused.value.code, refused.value.param) == ("unsupported_file_type", "file")


@pytest.mark.parametrize(
    ("name", "format_", "column_map", "param", "part"),
    [
        ("a.jsonl", "alpacca", None, "format", "did you mean 'alpaca'"),
        ("a.jsonl", "xyz", None, "format", "there are openai_preference"),
        ("a.jsonl", "plain_text", None, "format", "of .txt files"),
        ("a.txt", "alpaca", None, "format", "'plain_text'"),
        ("a.txt", None, {"text": "t"}, "column_map", "no columns"),
        ("a.csv", None, {"qestion": "Frage"}, "column_map", "did you mean 'question'"),
        ("a.csv", "alpaca", {"question": "Frage"}, "column_map", "of the format 'alpaca' have no key"),
        ("a.csv", None, {"question": "x", "system": "x"}, "column_map", "the same column"),
    ],
)
def test_wishes_that_cannot_be_granted_say_why(name, format_, column_map, param, part) -> None:
    with pytest.raises(SpecError) as refused:
        Layout.of(name, format_, column_map)
    assert refused.value.param == param
    assert part in refused.value.message
