"""Data: files with what their check found, and where more of them are dropped."""

from typing import Any
from urllib.parse import quote, urlencode

from nicegui import ui

from api.dashboard.client import Api
from api.dashboard.elements import empty, go_button, panel, pill_of, row
from api.dashboard.formats import ago, moment, number, size
from api.dashboard.frame import head, page
from api.dashboard.live import Live, live
from api.dashboard.table import Cell, Column, Table, text_cell
from api.dashboard.uploads import upload_form

_PAGE_ROWS = 50
_EVERY_S = 3.0
_PURPOSES = {
    "fine-tune": "Training files",
    "fine-tune-results": "Results of jobs",
    "": "All files",
}
_COLUMNS = [
    Column("name", "File"),
    Column("status", "Check"),
    Column("rows", "Rows", "right"),
    Column("format", "Format", wide=True),
    Column("size", "Size", "right", wide=True),
    Column("when", "Uploaded", "right", wide=True),
    Column("fault", "First fault", wide=True, wraps=True),
]


@page("/data", title="Data")
async def data(api: Api, purpose: str = "fine-tune", after: str = "") -> None:
    """The list of files."""
    with head("Data"):
        go_button("New job", "/new")
    with panel("Upload"):
        upload_form((await api.get("/v1/methods"))["data"])
    view = FileTable(api, purpose=purpose if purpose in _PURPOSES else "fine-tune", after=after)
    view.live = await live(view.fetch, view.show, every_s=_EVERY_S)


class FileTable:
    """The table with its filter and its pages."""

    live: Live

    def __init__(self, api: Api, *, purpose: str, after: str) -> None:
        self._api, self._purpose = api, purpose
        # The cursor of each page before this one; the last is this page's.
        self._cursors = ["", after] if after else [""]
        with panel(flush=True):
            with row().classes("filters"):
                ui.select(_PURPOSES, value=purpose, on_change=lambda e: self._ask(e.value)).props(
                    'aria-label="Purpose"'
                )
            self._table = Table(_COLUMNS)
            with ui.element("div") as self._none:
                empty(
                    "No file here",
                    "Drop one above. Its rows are checked at once, and each one that cannot be used is told "
                    "with its line.",
                )
            with row().classes("pages"):
                self._newer = ui.button("Newer", on_click=self._go_back).props("outline dense")
                self._older = ui.button("Older", on_click=self._go_on).props("outline dense")
        ui.on("file_uploaded", self._look)

    async def fetch(self) -> dict[str, Any]:
        """The page of files that is asked for."""
        return await self._api.get(
            "/v1/files", limit=_PAGE_ROWS, purpose=self._purpose or None, after=self._cursors[-1] or None
        )

    def show(self, found: dict[str, Any]) -> None:
        """Show it in place."""
        files = found["data"]
        self._table.show([_row_of(file) for file in files])
        self._table.element.set_visibility(bool(files))
        self._none.set_visibility(not files)
        self._newer.set_enabled(len(self._cursors) > 1)
        self._older.set_enabled(found["has_more"])
        self._last = files[-1]["id"] if files else ""

    async def _look(self) -> None:
        await self.live.refresh()

    async def _ask(self, purpose: str) -> None:
        self._purpose, self._cursors = purpose, [""]
        await self._turn()

    async def _go_on(self) -> None:
        self._cursors.append(self._last)
        await self._turn()

    async def _go_back(self) -> None:
        self._cursors.pop()
        await self._turn()

    async def _turn(self) -> None:
        await self.live.refresh()
        where = {"purpose": self._purpose, "after": self._cursors[-1]}
        ui.navigate.history.replace(f"/data?{urlencode(where)}")


def _row_of(file: dict[str, Any]) -> dict[str, Cell]:
    return {
        "id": file["id"],
        "name": text_cell(file["filename"], note=file["id"], href=f"/data/{quote(file['id'], safe='')}"),
        "status": pill_of("validating_files" if file["status"] == "uploaded" else file["status"]),
        "rows": number(file["rows"]),
        "format": file["format"] or "found by itself",
        "size": size(file["bytes"]),
        "when": text_cell(ago(file["created_at"]), title=moment(file["created_at"])),
        "fault": file["status_details"] or "",
    }
