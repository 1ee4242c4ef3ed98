"""A sample of a file's rows, and what only a sample can tell: near duplicates and scripts."""

import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from typing import Any
from zlib import crc32

from trainers.rows.formats import AnyRow, Document, Labelled, Pair
from trainers.rows.messages import Message

SAMPLE_ROWS = 1000
NEAR = 0.8  # of all runs of three words in two texts, the part that both have
_TEXT_CHARS = 2000  # of the beginning of a row
_MIX = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)  # a run is of three words; odd numbers spread their hashes
_SKETCH = 64
_TELLING = 8  # a near duplicate shares one of so many with all but certainty
_COMPARED = 16  # rows, at most, for each of them
# Chinese and Japanese put no space between words: a character is taken for one.
_IDEOGRAM = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_IDEOGRAM}]|[^\W{_IDEOGRAM}]+")


class RowSample:
    """Keeps the rows with the smallest digests: the same ones in whatever order they come, no duplicates."""

    def __init__(self, *, size: int = SAMPLE_ROWS):
        self._size = size
        self._kept: list[tuple[int, int, str]] = []  # a heap of (-digest, line, text)
        self._digests: set[int] = set()

    def wants(self, digest: int) -> bool:
        """Whether a row would come into the sample."""
        if len(self._kept) == self._size and digest > -self._kept[0][0]:
            return False
        return digest not in self._digests

    def pick(self, digests: list[int]) -> list[int]:
        """The places of those that might come into the sample."""
        limit = -self._kept[0][0] if len(self._kept) == self._size else max(digests)
        return [i for i, digest in enumerate(digests) if digest <= limit and digest not in self._digests]

    def add(self, row: AnyRow, *, digest: int) -> None:
        """Offer a row to the sample."""
        if not self.wants(digest):
            return
        self._keep(digest, row.line, _text_of(row))

    def _keep(self, digest: int, line: int, text: str) -> None:
        if not self.wants(digest):
            return
        heapq.heappush(self._kept, (-digest, line, text))
        self._digests.add(digest)
        if len(self._kept) > self._size:
            self._digests.remove(-heapq.heappop(self._kept)[0])

    def append(self, later: "RowSample", *, n_lines: int) -> None:
        """Join the sample of rows that come after so many lines."""
        for negative, line, text in later._kept:
            self._keep(-negative, line + n_lines, text)

    def summarize(self, *, n_first: int) -> dict[str, Any]:
        """{"rows", "near_duplicates": {"count", "first": [{"line", "near", "similarity"}]}, "scripts"}.

        scripts: {name: its part of all letters}.
        """
        texts = sorted((line, text) for _, line, text in self._kept)
        near = find_near(texts)
        return {
            "rows": len(texts),
            "near_duplicates": {"count": len(near), "first": near[:n_first]},
            "scripts": share_scripts([text for _, text in texts]),
        }


def find_near(texts: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Of (line, text) in order, each that is much like an earlier one: {"line", "near", "similarity"}.

    Broder's sketches: of the hashes of all runs of words, the smallest ones stand for the whole.
    """
    found = []
    sketches: list[frozenset[int]] = []
    having: defaultdict[int, list[int]] = defaultdict(list)
    for position, (line, text) in enumerate(texts):
        sketch = _sketch(text)
        known = frozenset(sketch)
        earlier = sorted({other for value in sketch[:_TELLING] for other in having[value]})
        best = max(((_compare(known, sketches[other]), -other) for other in earlier), default=(0.0, 0))
        if best[0] >= NEAR:
            found.append({"line": line, "near": texts[-best[1]][0], "similarity": round(best[0], 2)})
        sketches.append(known)
        for value in sketch[:_TELLING]:
            if len(having[value]) < _COMPARED:
                having[value].append(position)
    return found


def share_scripts(texts: list[str]) -> dict[str, float]:
    """What part of all letters is of each script, the most frequent first."""
    letters = Counter[str]()
    for text in texts:
        letters.update(text)
    scripts = Counter[str]()
    for letter, count in letters.items():
        if letter.isalpha():
            scripts[_script_of(letter)] += count
    total = scripts.total()
    return {script: round(count / total, 4) for script, count in scripts.most_common()}


def _script_of(letter: str) -> str:
    first = unicodedata.name(letter, "OTHER").partition(" ")[0]
    return "Han" if first == "CJK" else first.capitalize()


def _sketch(text: str) -> list[int]:
    """The smallest hashes of its runs of words."""
    known: dict[str, int] = {}
    hashes = []
    for word in _WORD.findall(text.lower()):
        if word not in known:
            known[word] = crc32(word.encode())
        hashes.append(known[word])
    hashes += [0] * (len(_MIX) - len(hashes))  # a text of fewer words is one run
    one, two, three = _MIX
    runs = zip(hashes, hashes[1:], hashes[2:], strict=False)
    return sorted({(a * one + b * two + c * three) & 0xFFFFFFFF for a, b, c in runs})[:_SKETCH]


def _compare(one: frozenset[int], other: frozenset[int]) -> float:
    """An estimate of the part of runs that two texts share, from what is smallest in both together.

    0 where it cannot be as much as NEAR, as of most pairs.
    """
    shared = one & other
    if len(shared) < NEAR * max(len(one), len(other)):
        return 0.0
    smallest = sorted(one | other)[:_SKETCH]
    return len(shared.intersection(smallest)) / len(smallest)


def _text_of(row: AnyRow) -> str:
    """What is said in a row, as far as it is looked at; a system text is often that of all rows."""
    if isinstance(row, Document):
        return row.text[:_TEXT_CHARS]
    said: list[Message]
    if isinstance(row, Pair):
        said = [*row.prompt, row.chosen, row.rejected]
    else:
        said = [*row.prompt, row.completion] if isinstance(row, Labelled) else row.messages
    return "\n".join(message["content"] for message in said if message["role"] != "system")[:_TEXT_CHARS]
