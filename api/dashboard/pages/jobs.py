"""Jobs: all of them, a page at a time, narrowed by status and method; several ticked ones share a chart."""

from typing import Any
from urllib.parse import urlencode

from nicegui import ui

from api.dashboard import job_words as words
from api.dashboard.charts import LineChart
from api.dashboard.client import Api
from api.dashboard.curves import fetch_curves, lines_of, names_of
from api.dashboard.elements import empty, go_button, panel, pill_of, row
from api.dashboard.formats import number
from api.dashboard.frame import head, page
from api.dashboard.live import Live, act, live
from api.dashboard.table import Cell, Column, Table

_JOBS = "/v1/fine_tuning/jobs"
_PAGE_ROWS = 25
_EVERY_S = 4.0
_MOST_COMPARED = 6
_STATUSES = {"": "Any status"} | {
    status: pill_of(status)["text"].capitalize() for status in ("running", *words.WAITING, *words.OVER)
}
_COLUMNS = [
    Column("name", "Job"),
    Column("status", "Status"),
    Column("progress", "Step"),
    Column("method", "Method", wide=True),
    Column("model", "Model", wide=True),
    Column("tokens", "Tokens", "right", wide=True),
    Column("took", "Took", "right", wide=True),
    Column("when", "Submitted", "right", wide=True),
]


@page("/jobs", title="Jobs")
async def jobs(api: Api, status: str = "", method: str = "", after: str = "") -> None:
    """The list of jobs."""
    with head("Jobs"):
        go_button("New job", "/new", main=True)
    methods = [found["name"] for found in (await api.get("/v1/methods"))["data"]]
    view = JobList(api, methods, status=status, method=method, after=after)
    view.live = await live(view.fetch, view.show, every_s=_EVERY_S)


class JobList:
    """The table with its filters, its pages and the chart of what is ticked."""

    live: Live

    def __init__(self, api: Api, methods: list[str], *, status: str, method: str, after: str) -> None:
        self._api = api
        self._asked = {
            "status": status if status in _STATUSES else "",
            "method": method if method in methods else "",
        }
        # The cursor of each page before this one; the last is this page's.
        self._cursors = ["", after] if after else [""]
        self._jobs: dict[str, dict[str, Any]] = {}
        with panel(flush=True):
            self._filters(methods)
            self._table = Table(_COLUMNS, on_select=self._compare)
            with ui.element("div") as self._nothing:
                empty("No job fits", "Choose another status or method.")
            with ui.element("div") as self._none:
                empty(
                    "No job yet",
                    "A job trains a model on a file of yours. It needs a base model and a checked file.",
                    links={"New job": "/new", "Upload data": "/data"},
                )
            with row().classes("pages"):
                self._newer = ui.button("Newer", on_click=self._go_back).props("outline dense")
                self._older = ui.button("Older", on_click=self._go_on).props("outline dense")
        self._comparison = Comparison(api)

    def _filters(self, methods: list[str]) -> None:
        by_method = {"": "Any method"} | {name: name for name in methods}
        with row().classes("filters"):
            ui.select(
                _STATUSES, value=self._asked["status"], on_change=lambda e: self._ask(status=e.value)
            ).props('aria-label="Status"')
            ui.select(
                by_method, value=self._asked["method"], on_change=lambda e: self._ask(method=e.value)
            ).props('aria-label="Method"')
            ui.label("Tick jobs to compare their curves.").classes("soft small wide-only")

    async def fetch(self) -> dict[str, Any]:
        """The page of jobs that is asked for."""
        asked = {name: value or None for name, value in self._asked.items()}
        return await self._api.get(_JOBS, limit=_PAGE_ROWS, after=self._cursors[-1] or None, **asked)

    def show(self, found: dict[str, Any]) -> None:
        """Show it in place."""
        jobs = found["data"]
        self._jobs |= {job["id"]: job for job in jobs}
        self._table.show([_row_of(job) for job in jobs])
        self._table.element.set_visibility(bool(jobs))
        narrowed = any(self._asked.values()) or len(self._cursors) > 1
        self._nothing.set_visibility(not jobs and narrowed)
        self._none.set_visibility(not jobs and not narrowed)
        self._newer.set_enabled(len(self._cursors) > 1)
        self._older.set_enabled(found["has_more"])
        self._last = jobs[-1]["id"] if jobs else ""

    async def _ask(self, **asked: str) -> None:
        self._asked |= asked
        self._cursors = [""]
        await self._turn()

    async def _go_on(self) -> None:
        self._cursors.append(self._last)
        await self._turn()

    async def _go_back(self) -> None:
        self._cursors.pop()
        await self._turn()

    async def _turn(self) -> None:
        await self.live.refresh()
        where = {**self._asked, "after": self._cursors[-1]}
        query = urlencode({name: value for name, value in where.items() if value})
        ui.navigate.history.replace(f"/jobs?{query}" if query else "/jobs")

    async def _compare(self, chosen: list[str]) -> None:
        await self._comparison.choose([self._jobs[job_id] for job_id in chosen])


class Comparison:
    """One metric of several jobs, over the lower edge of the page so that ticking moves nothing."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._curves: dict[str, dict[str, Any]] = {}
        self._jobs: list[dict[str, Any]] = []
        with panel("Compare") as self._panel:
            with self._panel.actions:
                self._metric = ui.select(
                    ["train_loss"], value="train_loss", on_change=lambda _: self._draw()
                ).props('aria-label="Metric"')
                ui.button("Close", on_click=self._close).props("outline dense")
            self._chart = LineChart(height_px=230)
            self._hint = ui.label().classes("soft small")
        self._panel.root.classes("dock").set_visibility(False)

    async def choose(self, jobs: list[dict[str, Any]]) -> None:
        """Draw the curves of these jobs, of the first few if they are many."""
        self._jobs = jobs[:_MOST_COMPARED]
        self._panel.root.set_visibility(bool(jobs))
        for job in self._jobs:
            if job["id"] not in self._curves or job["status"] not in words.OVER:
                found = await act(fetch_curves(self._api, job["id"], max_points=300))
                self._curves[job["id"]] = found or {}
        names = sorted({name for job in self._jobs for name in names_of(self._curves[job["id"]])})
        if names:
            value = self._metric.value if self._metric.value in names else names[0]
            self._metric.set_options(names, value=value)
        left_out = len(jobs) - len(self._jobs)
        self._hint.set_text(f"The first {_MOST_COMPARED} are drawn, {left_out} are not." if left_out else "")
        self._draw()

    def _draw(self) -> None:
        self._chart.show(
            {
                self._label(job): points
                for job in self._jobs
                if (points := lines_of(self._curves[job["id"]]).get(str(self._metric.value)))
            }
        )

    def _label(self, job: dict[str, Any]) -> str:
        name = words.name_of(job)
        alike = sum(words.name_of(other) == name for other in self._jobs) > 1
        return f"{name} {job['id'][-6:]}" if alike else name

    def _close(self) -> None:
        self._panel.root.set_visibility(False)


def _row_of(job: dict[str, Any]) -> dict[str, Cell]:
    return {
        "id": job["id"],
        "name": words.name_cell(job),
        "status": pill_of(job["status"]),
        "progress": words.progress_cell(job) if job["status"] == "running" else words.steps_cell(job),
        "method": words.method_of(job),
        "model": job["model"],
        "tokens": number(job.get("trained_tokens")),
        "took": words.took(job),
        "when": words.when_cell(job["created_at"]),
    }
