"""What is fetched from a hub, and what is not even asked for."""

from types import SimpleNamespace
from typing import Any

import pytest

from trainers.folders.artifacts import Refused
from trainers.hub import check_builder, choose_files, to_line

OWN = "hf://datasets/org/data@abc/train.parquet"


def builder(module: str, *files: str) -> Any:
    kind = type("Builder", (), {"__module__": module})
    found = kind()
    found.config = SimpleNamespace(data_files={"train": list(files)})
    return found


def test_only_what_an_import_copies_is_fetched():
    wanted = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
    others = [
        "pytorch_model.bin",
        "modeling_evil.py",
        "README.md",
        "onnx/model.safetensors",
        ".gitattributes",
    ]
    assert choose_files(dict.fromkeys(others + wanted, 1)) == wanted


@pytest.mark.parametrize("name", ["parquet", "json", "csv"])
def test_readers_that_only_read(name):
    check_builder(builder(f"datasets.packaged_modules.{name}.{name}", OWN), repo="org/data", sha="abc")


@pytest.mark.parametrize(
    ("module", "file", "code"),
    [
        ("datasets.packaged_modules.pandas.pandas", OWN, "unsupported_data"),  # it unpickles
        ("datasets_modules.evil", OWN, "unsupported_data"),
        ("datasets.packaged_modules.json.json", "/etc/passwd", "unsafe_data"),
        ("datasets.packaged_modules.json.json", "http://10.0.0.1/rows.jsonl", "unsafe_data"),
        ("datasets.packaged_modules.json.json", "hf://datasets/org/other@abc/rows.jsonl", "unsafe_data"),
        ("datasets.packaged_modules.json.json", "hf://datasets/org/data@main/rows.jsonl", "unsafe_data"),
    ],
)
def test_other_readers_and_other_files(module, file, code):
    with pytest.raises(Refused) as refused:
        check_builder(builder(module, OWN, file), repo="org/data", sha="abc")
    assert refused.value.code == code


def test_rows_become_lines():
    row = {"a": "\u00e4", "b": None, "c": [{"d": None, "e": 1}], "f": [None]}
    assert to_line(row).decode() == '{"a": "\u00e4", "c": [{"e": 1}], "f": [null]}\n'
    with pytest.raises(Refused) as refused:
        to_line({"image": b"bytes"})
    assert refused.value.code == "unsupported_data"
