"""What stands beside the form of a job: the training file, whether it fits, and how its rows are read."""

from typing import Any
from urllib.parse import quote

from nicegui import ui

from api.dashboard.client import Api, Refused, Trouble, locate
from api.dashboard.elements import Facts, Pill, panel
from api.dashboard.formats import UNKNOWN, number, size
from api.dashboard.token_view import TokenRows, ask_worker


class DataPreview:
    """The file that is chosen, and its first row as the chosen model and method see it."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.file: dict[str, Any] | None = None
        self.format: str | None = None
        self._asked: tuple[str, str] = ("", "")
        with panel("Data") as block:
            self._none = ui.label("Choose a training file to see its rows here.").classes("soft")
            with ui.element("div").classes("stack full-width") as self._some:
                with ui.element("div").classes("job-status"):
                    self._pill = Pill("uploaded")
                    self._link = ui.link("", "/data").classes("strong wrap")
                self._facts = Facts()
                self._button = ui.button("Show the first row", on_click=self._look).props("outline")
                self._said = ui.label().classes("soft small wrap").props("role=status")
                with ui.element("div").classes("stack full-width") as self._row:
                    self._tokens = TokenRows()
        block.root.classes("beside")
        self._some.set_visibility(False)

    async def choose(self, file_id: str) -> None:
        """Show another file. Raises Trouble."""
        self.file = await self._api.get(locate("files", file_id)) if file_id else None
        self.format = None
        file = self.file
        self._none.set_visibility(file is None)
        self._some.set_visibility(file is not None)
        self._row.set_visibility(False)
        if file is None:
            return
        try:
            report = await self._api.get(locate("files", file_id, "report"))
            self.format = report["format"]
        except Refused as refused:
            if refused.code not in ("report_not_ready", "no_report"):
                raise
        waits = file["status"] == "uploaded"
        self._pill.set_status("validating_files" if waits else file["status"])
        self._link.set_text(file["filename"])
        self._link.props(f'href="/data/{quote(file["id"], safe="")}"')
        self._facts.show(
            {"Rows": number(file["rows"]), "Format": self.format or UNKNOWN, "Size": size(file["bytes"])}
        )
        self._said.set_text(file["status_details"] or "")

    def watch(self, *, model: str, method: str) -> None:
        """Say with whose eyes a row is looked at; another view takes away what is shown."""
        if (model, method) != self._asked:
            self._asked = (model, method)
            self._row.set_visibility(False)

    async def _look(self) -> None:
        model, method = self._asked
        if self.file is None or not model:
            self._said.set_text("Choose a base model first.")
            return
        self._button.disable()
        self._said.set_text("A worker is looking at the file; the first time takes some seconds.")
        try:
            path = locate("files", self.file["id"], "preview")
            found = await ask_worker(self._api, path, row=1, model=model, method=method)
        except Trouble as trouble:
            self._said.set_text(str(trouble))
            return
        finally:
            self._button.enable()
        self._said.set_text("")
        self._tokens.show(found)
        self._row.set_visibility(True)
