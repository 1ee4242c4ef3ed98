"""Where imported things come from, as the text that is stored and can be replayed."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

_HUB = "hf://"
_JOB = "ftjob-"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(
    rf"hf://(?P<repo>{_NAME}/{_NAME})(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?(\?(?P<query>.*))?"
)


@dataclass(frozen=True)
class HubSource:
    """A repository of a hub at a revision; for data also which part of it."""

    repo: str
    revision: str = "main"
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        part = {name: value for name in ("config", "split") if (value := getattr(self, name)) is not None}
        return f"{_HUB}{self.repo}@{self.revision}" + (f"?{urlencode(part)}" if part else "")


def is_hub(source: str) -> bool:
    """Whether `source` names a hub's repository rather than a path."""
    return source.startswith(_HUB)


def parse_hub(source: str) -> HubSource:
    """`hf://org/name`, with `@revision` and `?config=…&split=…` where they were given. Raises ValueError."""
    match = _REFERENCE.fullmatch(source)
    if match is None or ".." in source:
        raise ValueError("a hub's repository is written as hf://organisation/name, or with @revision behind")
    part = dict(parse_qsl(match["query"] or "", strict_parsing=bool(match["query"])))
    if unknown := part.keys() - {"config", "split"}:
        raise ValueError(f"{min(unknown)} is not a part of a data set")
    return HubSource(match["repo"], match["revision"] or "main", part.get("config"), part.get("split"))


def is_job(source: str) -> bool:
    """Whether `source` is the id of a job, for the adapter that it trained."""
    return source.startswith(_JOB)


def join(sources: Sequence[str]) -> str:
    """Sources that are imported one after the other, as one text."""
    return sources[0] if len(sources) == 1 else json.dumps(list(sources))


def split(text: str) -> list[str]:
    """The sources that `join` made one text of."""
    return json.loads(text) if text.startswith('["') else [text]
