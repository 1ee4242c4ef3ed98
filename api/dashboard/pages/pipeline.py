"""Pipeline: its stages as a graph with live states, each leading to its job."""

from dataclasses import dataclass
from typing import Any

from nicegui import ui

from api.dashboard import job_words as words
from api.dashboard.client import Api, Refused, locate
from api.dashboard.elements import Facts, Pill, panel
from api.dashboard.formats import duration, moment
from api.dashboard.frame import head, page
from api.dashboard.live import Live, act, live
from api.dashboard.pipeline_graph import Graph, arrange, files_of

_EVERY_S = 2.0


@page("/pipelines/{pipeline_id}", title="Pipeline", within="/pipelines")
async def show_pipeline(api: Api, pipeline_id: str) -> None:
    """A pipeline, followed until it is over."""
    reader = Reader(api, pipeline_id)
    first = await reader.read()
    ui.page_title(f"{first.pipeline['name']} · Residency")
    view = View(api, first, await _file_names(api, first))
    view.live = await live(reader.read, view.show, every_s=_EVERY_S)


@dataclass
class State:
    """What the page shows; `jobs` by id, each as a single one."""

    pipeline: dict[str, Any]
    jobs: dict[str, dict[str, Any]]


class Reader:
    """Fetches the state; jobs that are over do not change, and are asked for once."""

    def __init__(self, api: Api, pipeline_id: str) -> None:
        self._api, self._id = api, pipeline_id
        self._over: dict[str, dict[str, Any]] = {}

    async def read(self) -> State:
        """The state at this moment."""
        pipeline = await self._api.get(locate("pipelines", self._id))
        jobs: dict[str, dict[str, Any]] = {}
        for stage in pipeline["stages"]:
            job_id = stage["job_id"]
            jobs[job_id] = self._over.get(job_id) or await self._api.get(words.url_of(job_id))
            if jobs[job_id]["status"] in words.OVER:
                self._over[job_id] = jobs[job_id]
        return State(pipeline, jobs)


async def _file_names(api: Api, state: State) -> dict[str, str]:
    names: dict[str, str] = {}
    for file_id in {file_id for job in state.jobs.values() for file_id in files_of(job)}:
        try:
            names[file_id] = (await api.get(locate("files", file_id)))["filename"]
        except Refused as refused:
            if refused.status != 404:
                raise
            names[file_id] = f"{file_id} (deleted)"
    return names


class View:
    """The head, the facts and the graph."""

    live: Live | None = None

    def __init__(self, api: Api, state: State, file_names: dict[str, str]) -> None:
        self._api = api
        self._id = state.pipeline["id"]
        with head(state.pipeline["name"], note=self._id):
            self._cancel = ui.button("Cancel", on_click=self._confirm).props("outline color=negative")
        with panel():
            with ui.element("div").classes("job-status"):
                self._pill = Pill(state.pipeline["status"])
                self._done = ui.label().classes("strong number")
            self._facts = Facts()
        with panel("Stages"):
            self._graph = Graph(arrange(state.pipeline["stages"], state.jobs), file_names)

    def show(self, state: State) -> None:
        """Show another state in the same places."""
        pipeline = state.pipeline
        stages = pipeline["stages"]
        is_over = pipeline["status"] in words.OVER
        self._pill.set_status(pipeline["status"])
        done = sum(stage["status"] == "succeeded" for stage in stages)
        self._done.set_text(f"{done} of {len(stages)} stages done")
        facts = {"Submitted": moment(pipeline["created_at"])}
        ended = pipeline["finished_at"]
        took = "" if ended is None else f", after {duration(ended - pipeline['created_at'])}"
        facts["Ended"] = f"{moment(ended)}{took}"
        self._facts.show(facts)
        self._graph.show(stages, state.jobs)
        self._cancel.set_visibility(not is_over)
        if is_over and self.live:
            self.live.stop()

    async def _confirm(self) -> None:
        with ui.dialog() as dialog, ui.card():
            ui.label("Cancel this pipeline?").classes("strong")
            ui.label(
                "Every stage that is not over stops. What finished stages made stays, and is used again."
            )
            with ui.element("div").classes("actions"):
                ui.button("Cancel the pipeline", on_click=lambda: dialog.submit(True)).props("color=negative")
                ui.button("Go on", on_click=lambda: dialog.submit(False)).props("outline")
        wanted = await dialog
        dialog.delete()
        if not wanted:
            return
        done = "The pipeline is being cancelled."
        if await act(self._api.post(locate("pipelines", self._id, "cancel")), done=done) and self.live:
            await self.live.refresh()
