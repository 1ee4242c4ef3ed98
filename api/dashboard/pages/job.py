"""Job: its curves, log, events, checkpoints and lineage as it goes, and the buttons that steer it."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from nicegui import ui

from api.dashboard import job_words as words
from api.dashboard.client import Api
from api.dashboard.curves import fetch_curves
from api.dashboard.elements import Bar, Facts, Pill, go_button, panel
from api.dashboard.formats import UNKNOWN, ago, number
from api.dashboard.frame import head, page
from api.dashboard.job_curves import Curves
from api.dashboard.job_details import Checkpoints, Lineage, Parameters, Samples, times_of
from api.dashboard.job_log import Log, Timeline
from api.dashboard.job_steering import Steering, Trouble
from api.dashboard.live import Live, live

_EVERY_S = 2.0


@page("/jobs/{job_id}", title="Job", within="/jobs")
async def show_job(api: Api, job_id: str) -> None:
    """A job, followed until it is over."""
    job = await api.get(words.url_of(job_id))
    ui.page_title(f"{words.name_of(job)} · Residency")
    view = JobPage(api, job)
    view.live = await live(view.fetch, view.show, every_s=_EVERY_S)


@dataclass
class State:
    """What the page shows."""

    job: dict[str, Any]
    curves: dict[str, Any]
    events: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    lines: list[str]
    ancestors: list[dict[str, Any]]


class JobPage:
    """The blocks of the page and how they are filled."""

    def __init__(self, api: Api, job: dict[str, Any]) -> None:
        self.live: Live | None = None
        self._api, self._id = api, job["id"]
        self._ancestors: list[dict[str, Any]] | None = None
        name = words.name_of(job)
        with head(name, note=job["id"] if name != job["id"] else ""):
            self._steering = Steering(api, job, changed=self._look_again)
        self._trouble = Trouble(api, self._id)
        self._summary = Summary()
        self._curves = Curves()
        with panel(flush=True):
            self._tabs()

    def _tabs(self) -> None:
        with ui.tabs().props("align=left dense narrow-indicator outside-arrows mobile-arrows") as tabs:
            names = ("Log", "Events", "Checkpoints", "Samples", "Parameters", "Lineage")
            found = {name: ui.tab(name) for name in names}
        with ui.tab_panels(tabs, value="Log", animated=False, keep_alive=True).classes("full-width job-tabs"):
            with ui.tab_panel(found["Log"]):
                self._log = Log(self._api, self._id)
            with ui.tab_panel(found["Events"]):
                self._timeline = Timeline()
            with ui.tab_panel(found["Checkpoints"]):
                self._checkpoints = Checkpoints()
            with ui.tab_panel(found["Samples"]):
                self._samples = Samples()
            with ui.tab_panel(found["Parameters"]).classes("padded"):
                self._parameters = Parameters()
            with ui.tab_panel(found["Lineage"]).classes("padded"):
                self._lineage = Lineage()

    async def fetch(self) -> State:
        """The job first: when it is over, everything else is there to its end."""
        job = await self._api.get(words.url_of(self._id))
        if self._ancestors is None:
            self._ancestors = await Lineage.fetch(self._api, job)
        return State(
            job=job,
            curves=await fetch_curves(self._api, self._id),
            events=await Timeline.fetch(self._api, self._id),
            checkpoints=await Checkpoints.fetch(self._api, self._id),
            lines=await self._log.read_on(),
            ancestors=self._ancestors,
        )

    def show(self, state: State) -> None:
        """Show another state in the same places."""
        job = state.job
        is_over = job["status"] in words.OVER
        self._steering.show(job)
        self._trouble.show(job)
        self._summary.show(job)
        self._curves.show(state.curves, is_over=is_over)
        self._log.show(state.lines)
        self._timeline.show(state.events)
        self._checkpoints.show(state.checkpoints)
        self._samples.show(state.events)
        self._parameters.show(job)
        self._lineage.show(state.ancestors, job)
        if is_over and self.live:
            self.live.stop()

    async def _look_again(self) -> None:
        if self.live:
            await self.live.refresh()


class Summary:
    """Where the job stands, on a few lines."""

    def __init__(self) -> None:
        with panel():
            with ui.element("div").classes("job-status"):
                self._pill = Pill("queued")
                self._step = ui.label().classes("strong number")
                self._more = ui.label().classes("soft")
            self._bar = Bar()
            self._facts = Facts()
            with ui.element("div").classes("row-of") as self._made:
                self._model = ui.label().classes("mono wrap")
                self._chat = go_button("Chat with it", "/playground")

    def show(self, job: dict[str, Any]) -> None:
        """Show another state in the same places."""
        progress = job.get("progress") or {}
        self._pill.set_status(job["status"])
        self._step.set_text(_where(progress))
        self._more.set_text(_more(job))
        self._bar.show(1.0 if job["status"] == "succeeded" else (progress.get("percent") or 0) / 100)
        facts = {"Method": f"{words.method_of(job)} of {job['model']}", **times_of(job)}
        if job["trained_tokens"] is not None:
            facts["Trained on"] = f"{number(job['trained_tokens'])} tokens"
        self._facts.show(facts)
        made = job["fine_tuned_model"]
        self._made.set_visibility(bool(made))
        if made:
            self._model.set_text(made)
            self._chat.props(f'href="/playground?model={quote(made, safe="")}"')


def _where(progress: dict[str, Any]) -> str:
    if progress.get("step") is None:
        return ""
    return f"Step {number(progress['step'])} of {number(progress['total_steps'])}"


def _more(job: dict[str, Any]) -> str:
    if job["status"] in words.WAITING:
        starts = job.get("expected_start_at")
        return words.why_waiting(job) + (f"; starts {ago(starts)}" if starts else "")
    if job["status"] == "running":
        told = [job["phase"] or "starting", words.speed_of(job)]
        eta = words.left(job)
        told.append(f"{eta} left" if eta != UNKNOWN else "")
        return " · ".join(text for text in told if text and text != UNKNOWN)
    return ""
