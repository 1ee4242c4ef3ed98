"""Shell transcripts of a Markdown page: commands and the output that the page promises."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ID = re.compile(r"(?:file|ftjob|ftevent|ftckpt|chatcmpl|dep|pipe|upload|part|vote|fp)[-_][\w-]+|ft:[\w.:-]+")
_ELIDED = "…"
_VARYING_KEYS = ("created", "bytes", "estimated_finish")


@dataclass(frozen=True)
class Step:
    """A command and its promised output."""

    line: int
    command: str
    output: str


def read_steps(page: Path) -> Iterator[Step]:
    """The commands of all `console` blocks, in order."""
    text = page.read_text()
    for block in _BLOCK.finditer(text):
        first_line = text.count("\n", 0, block.start(1)) + 1
        for found in re.finditer(r"^\$ (.*?)(?=^\$ |\Z)", block[1], re.MULTILINE | re.DOTALL):
            command, output = _split(found[1])
            yield Step(first_line + block[1].count("\n", 0, found.start()), command, output)


def _split(text: str) -> tuple[str, str]:
    """The command ends with the first line after which no quote and no line is open."""
    lines = text.splitlines()
    for count in range(1, len(lines) + 1):
        command = "\n".join(lines[:count])
        if command.count("'") % 2 == 0 and not command.rstrip().endswith(("\\", "|")):
            return command, "\n".join(lines[count:]).strip()
    raise ValueError(f"the command does not end: {text}")


@dataclass
class Names:
    """What the page calls things, and what they are called here."""

    here: dict[str, str] = field(default_factory=dict)

    def translate(self, text: str) -> str:
        """`text` with the page's ids replaced by those of this run."""
        return _ID.sub(lambda found: self.here.get(found[0], found[0]), text)

    def compare(self, expected: str, actual: str) -> None:
        """Assert that the output is what the page promises; learns ids on the way."""
        if expected.startswith("{"):
            self._compare(json.loads(expected), json.loads(actual), where="")
            return
        pattern = re.escape(self.translate(expected)).replace(re.escape(_ELIDED), "(?s:.*)")
        assert re.fullmatch(pattern, actual.strip()), f"expected {expected!r}, got {actual!r}"

    def _compare(self, expected: Any, actual: Any, *, where: str) -> None:
        if expected == _ELIDED:
            return
        key = where.rpartition(".")[2]
        if isinstance(expected, dict) and isinstance(actual, dict):
            named = expected.keys() - {_ELIDED}
            assert named <= actual.keys(), f"{where}: {named - actual.keys()} is missing"
            assert _ELIDED in expected or named == actual.keys(), f"{where}: also {actual.keys() - named}"
            for name in named:
                self._compare(expected[name], actual[name], where=f"{where}.{name}")
        elif isinstance(expected, list) and isinstance(actual, list):
            shown = expected[:-1] if expected[-1:] == [_ELIDED] else expected
            assert len(shown) <= len(actual), f"{where}: only {actual}"
            assert len(expected) > len(shown) or len(shown) == len(actual), f"{where}: also {actual}"
            for index, item in enumerate(shown):
                self._compare(item, actual[index], where=f"{where}.{index}")
        elif isinstance(expected, int) and (key.endswith("_at") or key in _VARYING_KEYS):
            assert type(actual) is int, f"{where}: {actual!r} is no whole number"
        elif isinstance(expected, str) and isinstance(actual, str):
            if _ID.fullmatch(expected) and expected not in self.here:
                assert _ID.fullmatch(actual), f"{where}: {actual!r} is no id"
                self.here[expected] = actual
            assert self.translate(expected) == actual, where
        else:
            assert (type(expected), expected) == (type(actual), actual), where
