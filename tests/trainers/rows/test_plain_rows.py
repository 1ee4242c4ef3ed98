"""What is known to be good without being read is what reading takes: the same format, no fault, no notice."""

import json
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trainers.rows.findings import find_notices
from trainers.rows.formats import detect_format, read_row
from trainers.rows.messages import MANY_CHARS, MANY_TURNS
from trainers.rows.plain import _CHECKS, make_check

GOOD: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Say hello.", "input": "", "output": "Hello"},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "preference": {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
    "question_preference": {"question": "Hi", "response_chosen": "Hello", "response_rejected": "No"},
    "question": {"question": "Hi"},
    "prompt": {"prompt": "Hi"},
    "text": {"text": "Hi"},
}
CHECKS = {name: make_check(name) for name in GOOD}
KEYS = sorted({key for row in GOOD.values() for key in row} | {"role", "content", "from", "value", "tools"})
TEXTS = st.sampled_from(["", " ", "\t\n", "Hi", "\u2028", "\x1c", "Hello"])
ROLES = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool"])
SAID = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS}), max_size=5)
TURNS = st.lists(st.fixed_dictionaries({"from": ROLES, "value": TEXTS}), max_size=5)
VALUES = st.none() | st.integers() | TEXTS | st.text(max_size=5) | SAID | TURNS
CHANGES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2)
DROPS = st.sets(st.sampled_from(KEYS), max_size=1)


def reads(line: bytes, name: str) -> bool:
    try:
        row = json.loads(line.decode())
        if not isinstance(row, dict) or detect_format(row) != name:
            return False
        return not find_notices(read_row(row, name, line=1))
    except ValueError:
        return False


def test_every_check_is_tried() -> None:
    assert GOOD.keys() == _CHECKS.keys()


@pytest.mark.parametrize("name", GOOD)
def test_a_usual_row_is_known_to_be_good(name: str) -> None:
    check = CHECKS[name]
    assert check is not None
    assert check.takes(json.dumps(GOOD[name]).encode() + b"\n")
    assert reads(json.dumps(GOOD[name]).encode(), name)


def agree(row: Any, name: str) -> None:
    line = json.dumps(row).encode()
    check = CHECKS[name]
    assert check is not None
    if check.takes(line):
        assert reads(line, name), line


def grow(name: str, n: int, letter: str) -> dict[str, Any]:
    """A usual row with so many characters in all."""
    row = json.loads(json.dumps(GOOD[name]))
    key = next(reversed(row))
    held, inner = (row[key][-1], next(reversed(row[key][-1]))) if isinstance(row[key], list) else (row, key)
    said = [v for turn in row.get(key) for v in [turn[inner]]] if held is not row else list(row.values())
    held[inner] += letter * (n - sum(map(len, said)))
    return row


@pytest.mark.parametrize("name", sorted(GOOD.keys() - {"text"}))
@pytest.mark.parametrize("letter", ["a", "四", "\U0001f600"])
def test_a_long_row_is_handed_on_and_one_of_many_bytes_is_not(name: str, letter: str) -> None:
    check = CHECKS[name]
    assert check is not None
    for n, is_long in ((MANY_CHARS - 2, False), (MANY_CHARS + 1, True)):
        line = json.dumps(grow(name, n, letter)).encode()
        taken = [check.takes(line), check.takes_all([line], data=line)]
        assert taken == [not is_long, not is_long]
        assert reads(line, name) is not is_long


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_a_row_of_many_turns_is_handed_on(name: str) -> None:
    (key, turns), check = next(iter(GOOD[name].items())), CHECKS[name]
    assert check is not None
    for n, is_long in ((MANY_TURNS, False), (MANY_TURNS + 2, True)):
        line = json.dumps({key: turns[-2:] * (n // 2)}).encode()
        assert [check.takes(line), check.takes_all([line], data=line)] == [not is_long, not is_long]
        assert reads(line, name) is not is_long


def test_a_document_may_be_of_any_length() -> None:
    line = json.dumps({"text": "a" * 3 * MANY_CHARS}).encode()
    check = CHECKS["text"]
    assert check is not None
    assert check.takes(line)
    assert check.takes_all([line], data=line)


@pytest.mark.parametrize("length", range(5))
def test_roles_in_every_order(length: int) -> None:
    for roles in product(["system", "user", "assistant"], repeat=length):
        agree({"messages": [{"role": role, "content": "Hi"} for role in roles]}, "messages")
    for roles in product(["system", "human", "gpt"], repeat=length):
        agree({"conversations": [{"from": role, "value": "Hi"} for role in roles]}, "sharegpt")


@pytest.mark.parametrize("name", GOOD)
def test_a_row_with_another_text_in_one_place(name: str) -> None:
    for other in ("", " ", "\t\n", "\u2028", "\x1c", "Hello", "No", "user", None, 1, ["Hi"]):
        for key, value in GOOD[name].items():
            agree(GOOD[name] | {key: other}, name)
            for i, message in enumerate(value if isinstance(value, list) else []):
                for inner in message:
                    changed = [*value[:i], message | {inner: other}, *value[i + 1 :]]
                    agree(GOOD[name] | {key: changed}, name)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(GOOD)), DROPS, CHANGES, st.booleans())
def test_what_is_known_to_be_good_is_what_reading_takes(
    name: str, drops: set[str], changes: dict[str, Any], ascii_only: bool
) -> None:
    row = {key: value for key, value in GOOD[name].items() if key not in drops} | changes
    line = json.dumps(row, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    check = CHECKS[name]
    assert check is not None
    if check.takes(line):
        assert reads(line, name), line


@given(st.binary(max_size=60), st.sampled_from(sorted(GOOD)))
@example(b'\xef\xbb\xbf{"text": "Hi"}', "text")
@example(b'{"text": "\\ud800"}', "text")
@example(b'{"text": "a\x00b"}', "text")
@example(b'{"text": "\xff"}', "text")
@example(b'{"text": "Hi"} {"text": "Hi"}', "text")
@example(b'{"text": "Hi", "text": 1}', "text")
@example(b'{"text": 1, "text": "Hi"}', "text")
@example(b'\x0c{"text": "Hi"}', "text")
def test_bytes_that_cannot_be_read_are_never_known_to_be_good(line: bytes, name: str) -> None:
    check = CHECKS[name]
    assert check is not None
    if check.takes(line):
        assert reads(line, name), line


@pytest.mark.parametrize(
    ("data", "good"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', True),
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', True),
        (b'{"text": "a"}\n{"text": "b"}', True),
        (b'{"text": "a"} {"text": "b"}\n\n', False),  # as many objects as lines, but not one a line
        (b'{"text":\n"a"} {"text": "b"}\n', False),
        (b'{"text": "a"}\n{"text": " "}\n', False),
        (b'{"text": "a"}\n{"text": 1}\n', False),
    ],
)
def test_a_block_is_known_to_be_good_when_each_of_its_lines_is(data: bytes, good: bool) -> None:
    check = CHECKS["text"]
    assert check is not None
    lines = data.removesuffix(b"\n").split(b"\n")
    assert check.takes_all(lines, data=data) is good
    assert all(map(check.takes, lines)) is good
