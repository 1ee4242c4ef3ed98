"""What a job says: its events as a timeline, and the log of its trainer as it is printed."""

from typing import Any

from nicegui import ui

from api.dashboard import job_words as words
from api.dashboard.client import Api
from api.dashboard.elements import empty
from api.dashboard.formats import ago, moment
from api.dashboard.table import Cell, Column, Table

_SHOWN_EVENTS = 100
_SHOWN_LINES = 1000
_LEVELS = {"warn": "warn", "error": "bad"}


class Timeline:
    """The newest events, without the numbers of the steps."""

    def __init__(self) -> None:
        self._table = Table([Column("when", "When"), Column("what", "What happened", wraps=True)])

    @staticmethod
    async def fetch(api: Api, job_id: str) -> list[dict[str, Any]]:
        """The newest events, newest first."""
        path = words.url_of(job_id, "events")
        return (await api.get(path, type="message", limit=_SHOWN_EVENTS))["data"]

    def show(self, events: list[dict[str, Any]]) -> None:
        """Show them in place."""
        self._table.show([_row_of(event) for event in events])


def _row_of(event: dict[str, Any]) -> dict[str, Cell]:
    when = event["created_at"]
    level = _LEVELS.get(event["level"], "")
    return {
        "id": event["id"],
        "when": {"text": ago(when), "title": moment(when), "class": "soft nowrap"},
        "what": {"text": event["message"], "class": f"{level}-text" if level else ""},
    }


class Log:
    """What the trainers print, followed from where it was read to."""

    def __init__(self, api: Api, job_id: str) -> None:
        self._api, self._path = api, words.url_of(job_id, "logs")
        self._offset_bytes, self._attempt, self._rest = 0, "", ""
        self._lines = ui.log(max_lines=_SHOWN_LINES).classes("log full-width")
        self._lines.set_visibility(False)
        with ui.element("div").classes("full-width") as self._nothing:
            empty("Nothing was printed", "The log begins when a worker starts the trainer.")

    async def read_on(self) -> list[str]:
        """The lines that came since the last time."""
        found: list[str] = []
        while True:
            piece, headers = await self._api.get_bytes(self._path, offset=self._offset_bytes)
            attempt = headers.get("x-attempt", "")
            if attempt != self._attempt:
                first, self._attempt = not self._attempt, attempt
                if not first:
                    found.append(f"--- attempt {attempt} ---")
                if self._offset_bytes:  # that was a place in another attempt's log
                    self._offset_bytes, self._rest = 0, ""
                    continue
            if not piece:
                return found[-_SHOWN_LINES:]
            self._offset_bytes += len(piece)
            *whole, self._rest = (self._rest + piece.decode("utf-8", "replace")).split("\n")
            found += [line.rsplit("\r", 1)[-1] for line in whole]

    def show(self, lines: list[str]) -> None:
        """Add them at the end."""
        if lines:
            self._nothing.set_visibility(False)
            self._lines.set_visibility(True)
            self._lines.push("\n".join(lines))
