"""Pipelines: several trainings as one submission, newest first, with how far each is."""

from typing import Any

from nicegui import ui

from api.dashboard import job_words as words
from api.dashboard.client import Api
from api.dashboard.elements import empty, go_button, panel, pill_of, row
from api.dashboard.formats import UNKNOWN, duration
from api.dashboard.frame import head, page
from api.dashboard.live import Live, live
from api.dashboard.table import Cell, Column, Table, text_cell

_EVERY_S = 4.0
_PAGE_ROWS = 25
_COLUMNS = [
    Column("name", "Pipeline"),
    Column("status", "Status"),
    Column("done", "Stages done"),
    Column("now", "Now", wide=True, wraps=True),
    Column("took", "Took", "right", wide=True),
    Column("when", "Submitted", "right", wide=True),
]


@page("/pipelines", title="Pipelines")
async def pipelines(api: Api) -> None:
    """The list of pipelines."""
    with head("Pipelines"):
        go_button("New pipeline", "/pipelines/new", main=True)
    view = PipelineList(api)
    view.live = await live(view.fetch, view.show, every_s=_EVERY_S)


class PipelineList:
    """The table and its pages."""

    live: Live

    def __init__(self, api: Api) -> None:
        self._api = api
        self._cursors = [""]  # of each page before this one; the last is this page's
        self._last = ""
        with panel(flush=True):
            self._table = Table(_COLUMNS)
            with ui.element("div") as self._none:
                empty(
                    "No pipeline yet",
                    "A pipeline runs several trainings in the order in which they need each other, such as "
                    "pretraining, then supervised, then reward and reinforcement. It is written as YAML.",
                    links={"New pipeline": "/pipelines/new"},
                )
            with row().classes("pages") as self._pages:
                self._newer = ui.button("Newer", on_click=self._go_back).props("outline dense")
                self._older = ui.button("Older", on_click=self._go_on).props("outline dense")

    async def fetch(self) -> dict[str, Any]:
        """The page that is asked for."""
        return await self._api.get("/v1/pipelines", limit=_PAGE_ROWS, after=self._cursors[-1] or None)

    def show(self, found: dict[str, Any]) -> None:
        """Show it in place."""
        rows = found["data"]
        self._table.show([_row_of(pipeline) for pipeline in rows])
        self._table.element.set_visibility(bool(rows))
        self._none.set_visibility(not rows)
        self._pages.set_visibility(len(self._cursors) > 1 or found["has_more"])
        self._newer.set_enabled(len(self._cursors) > 1)
        self._older.set_enabled(found["has_more"])
        self._last = rows[-1]["id"] if rows else ""

    async def _go_on(self) -> None:
        self._cursors.append(self._last)
        await self.live.refresh()

    async def _go_back(self) -> None:
        self._cursors.pop()
        await self.live.refresh()


def _row_of(pipeline: dict[str, Any]) -> dict[str, Cell]:
    stages = pipeline["stages"]
    done = sum(stage["status"] == "succeeded" for stage in stages)
    ended = pipeline["finished_at"]
    return {
        "id": pipeline["id"],
        "name": text_cell(
            pipeline["name"], href=f"/pipelines/{pipeline['id']}", note=f"{pipeline['id'][:12]}…"
        ),
        "status": pill_of(pipeline["status"]),
        "done": text_cell(f"{done} of {len(stages)}", bar=done / len(stages)),
        "now": _now(stages),
        "took": UNKNOWN if ended is None else duration(ended - pipeline["created_at"]),
        "when": words.when_cell(pipeline["created_at"]),
    }


def _now(stages: list[dict[str, Any]]) -> str:
    """The stages that are neither done nor wait for others, and what became of failed ones."""
    told = [stage for stage in stages if stage["status"] not in ("succeeded", "waiting", "cancelled")]
    return ", ".join(f"{stage['name']} {pill_of(stage['status'])['text']}" for stage in told) or UNKNOWN
