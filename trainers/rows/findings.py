"""What is found in a training file, or in a part of one: parts are looked at side by side and joined."""

from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from trainers.rows.duplicates import Duplicates, digest_lines, digest_record
from trainers.rows.files import RowError, Rows
from trainers.rows.formats import AnyRow, Document, Labelled, Pair, Prompt, Row, RowKind, awaits_answer
from trainers.rows.messages import MANY_CHARS, MANY_TURNS, Message
from trainers.rows.sample import RowSample

N_FIRST = 100  # lines that are named of each kind of finding; all are counted
_OF_ROWS = ("empty_turn", "role_order", "over_long")  # what a row alone tells
NOTICES = (*_OF_ROWS, "odd_last_turn")


@dataclass
class Findings:
    """Counts, the first lines of each kind, and what duplicates and the sample are found from."""

    n_rows: int = 0
    n_used: int = 0
    blank_lines: int = 0
    format: str | None = None
    kind: RowKind | None = None
    whole: bool = True
    reasons: Counter[str] = field(default_factory=Counter)
    errors: list[RowError] = field(default_factory=list)
    n_noticed: Counter[str] = field(default_factory=Counter)
    noticed: list[tuple[str, int]] = field(default_factory=list)  # (which, line)
    n_answered: int = 0  # conversations that are read as prompts, up to their last answer
    duplicates: Duplicates = field(default_factory=Duplicates)
    sample: RowSample = field(default_factory=RowSample)

    def collect(self, rows: Rows) -> "Findings":
        """Look at every row."""
        for row in rows.skim(self._take_plain):
            if isinstance(row, RowError):
                self.add_error(row)
                continue
            self.n_used += 1
            digest = digest_record(rows.record)
            self.duplicates.add(digest, line=row.line)
            self.sample.add(row, digest=digest)
            for which in find_notices(row):
                self._add_notice(which, row.line)
            if rows.format == "prompt_messages" and isinstance(row, Prompt):
                if awaits_answer(row.item):
                    self._add_notice("odd_last_turn", row.line)
                else:
                    self.n_answered += 1
        self.n_rows, self.blank_lines = rows.n_rows, rows.blank_lines
        self.format, self.kind = rows.format, rows.kind
        return self

    def add_error(self, error: RowError) -> None:
        """Count what is wrong with a row, or with the rest of the file."""
        self.whole = self.whole and not error.ends_file
        self.reasons[error.code] += 1
        if self.reasons[error.code] <= N_FIRST:
            self.errors.append(error)

    @property
    def n_lines(self) -> int:
        """Of a part of a file every line is a row or blank."""
        return self.n_rows + self.blank_lines

    def append(self, later: "Findings") -> None:
        """Join what was found in the part of a file that comes after this one."""
        n_lines = self.n_lines
        for error in later.errors:
            self.add_error(replace(error, line=error.line + n_lines))
        for which, line in later.noticed:
            self._add_notice(which, line + n_lines)
        # Above, those of which the lines are known were counted.
        self.reasons += later.reasons - Counter(error.code for error in later.errors)
        self.n_noticed += later.n_noticed - Counter(which for which, _ in later.noticed)
        self.duplicates.append(later.duplicates, n_lines=n_lines)
        self.sample.append(later.sample, n_lines=n_lines)
        self.n_rows += later.n_rows
        self.n_used += later.n_used
        self.n_answered += later.n_answered
        self.blank_lines += later.blank_lines
        self.format, self.kind = self.format or later.format, self.kind or later.kind

    def summarize(self, *, max_invalid_fraction: float) -> dict[str, Any]:
        """The report, as `check_file` describes it."""
        n_refused = self.n_rows - self.n_used
        fits = self.n_used > 0 and n_refused <= max_invalid_fraction * self.n_rows + 1e-9
        return {
            "rows": self.n_rows,
            "rows_used": self.n_used,
            "rows_refused": n_refused,
            "blank_lines": self.blank_lines,
            "format": self.format,
            "kind": self.kind,
            "whole": self.whole,
            "max_invalid_fraction": max_invalid_fraction,
            "accepted": self.whole and fits,
            "reasons": dict(self.reasons.most_common()),
            "errors": [
                {"line": error.line, "code": error.code, "message": error.message} for error in self.errors
            ],
            "notices": {which: self._list_noticed(which) for which in NOTICES},
            "duplicates": self.duplicates.summarize(n_first=N_FIRST),
            "sample": self.sample.summarize(n_first=N_FIRST),
        }

    def _take_plain(self, records: list[bytes], first: int) -> list[int]:
        """Count these rows, which are good; those that the sample wants are to be read for it."""
        digests = digest_lines(records)
        wanted = self.sample.pick(digests)
        self.n_used += len(records) - len(wanted)
        lines = array("I", range(first, first + len(records)))
        for i in reversed(wanted):
            del digests[i], lines[i]
        self.duplicates.extend(digests, lines)
        return wanted

    def _list_noticed(self, which: str) -> dict[str, Any]:
        if which == "odd_last_turn" and not self.n_answered:  # every prompt ends so
            return {"count": 0, "lines": []}
        lines = [line for other, line in self.noticed if other == which]
        return {"count": self.n_noticed[which], "lines": lines}

    def _add_notice(self, which: str, line: int) -> None:
        self.n_noticed[which] += 1
        if self.n_noticed[which] <= N_FIRST:
            self.noticed.append((which, line))


def find_notices(row: AnyRow) -> list[str]:
    """What may be meant and is trained on as it is.

    Turns that say nothing, roles out of their order, more than MANY_TURNS messages or MANY_CHARS characters.
    """
    if isinstance(row, Document):
        return []
    messages = row.messages if isinstance(row, Row | Prompt) else row.prompt
    found = [any(_is_empty(message) for message in messages), not _in_order(messages), _is_over_long(row)]
    return [code for code, is_so in zip(_OF_ROWS, found, strict=True) if is_so]


def _is_over_long(row: Row | Prompt | Pair | Labelled) -> bool:
    """Whether what is said in it is long; of a pair, both answers are counted."""
    if isinstance(row, Row | Prompt):
        said = row.messages
    else:
        answers = [row.chosen, row.rejected] if isinstance(row, Pair) else [row.completion]
        said = [*row.prompt, *answers]
    return len(said) > MANY_TURNS or sum(len(message["content"]) for message in said) > MANY_CHARS


def _is_empty(message: Message) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


def _in_order(messages: list[Message]) -> bool:
    """Whether users and assistants take turns, after the system at most."""
    roles = [message["role"] for message in messages]
    repeated = any(one == next_ and one in ("user", "assistant") for one, next_ in pairwise(roles))
    return not repeated and "system" not in roles[1:]
