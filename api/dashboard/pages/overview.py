"""Overview: what runs, what waits and why, what failed, and the machines."""

import time
from dataclasses import dataclass, field
from typing import Any

from nicegui import ui

from api.dashboard import job_words as words
from api.dashboard.client import Api, Refused
from api.dashboard.elements import empty, go_button, panel, pill_of
from api.dashboard.formats import UNKNOWN, ago, percent, size
from api.dashboard.frame import head, page
from api.dashboard.live import live
from api.dashboard.table import Cell, Column, Table, text_cell

_JOBS = "/v1/fine_tuning/jobs"
_EVERY_S = 4.0
_SOME = 10
_FAILURES = 5


@dataclass
class State:
    """What the page shows. `nodes` is None for keys that may not see them."""

    running: list[dict[str, Any]]
    waiting: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    failed_today: int
    nodes: list[dict[str, Any]] | None
    has_jobs: bool
    has_models: bool
    more_waiting: bool


@dataclass
class Reader:
    """Fetches the state; what failed once does not change, and is asked for once."""

    api: Api
    _failed: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def read(self) -> State:
        """The state at this moment."""
        running = (await self.api.get(_JOBS, status="running", limit=50))["data"]
        waiting: list[dict[str, Any]] = []
        more = False
        for status in words.WAITING:
            found = await self.api.get(_JOBS, status=status, limit=_SOME)
            waiting += found["data"]
            more = more or found["has_more"]
        failed = (await self.api.get(_JOBS, status="failed", limit=100))["data"]
        day_ago = time.time() - 24 * 3600
        failed_today = sum((job["finished_at"] or 0) > day_ago for job in failed)
        failed = failed[:_FAILURES]
        for job in failed:
            if job["id"] not in self._failed:
                self._failed[job["id"]] = await self.api.get(words.url_of(job["id"]))
        has_jobs = bool(running or waiting or failed) or bool((await self.api.get(_JOBS, limit=1))["data"])
        models = (await self.api.get("/v1/models"))["data"]
        return State(
            running=running,
            waiting=await words.in_detail(self.api, waiting),
            failed=[self._failed[job["id"]] for job in failed],
            failed_today=failed_today,
            nodes=await self._read_nodes(),
            has_jobs=has_jobs,
            has_models=any(model["status"] == "ready" for model in models),
            more_waiting=more,
        )

    async def _read_nodes(self) -> list[dict[str, Any]] | None:
        try:
            return (await self.api.get("/v1/nodes"))["data"]
        except Refused as refused:
            if refused.status == 403:  # nodes are shown to admins of the host
                return None
            raise


@page("/", title="Overview")
async def overview(api: Api) -> None:
    """What runs, what waits, what failed, and where."""
    with head("Overview"):
        go_button("New job", "/new", main=True)
    view = View()
    await live(Reader(api).read, view.show, every_s=_EVERY_S)


class View:
    """The panels of the page."""

    def __init__(self) -> None:
        self._first_steps = empty("", "")
        self._first_steps.set_visibility(False)
        with self._first_steps:
            self._first_steps.clear()
            self._steps()
        self._figures = Figures(["Running", "Waiting", "Devices in use", "Failed in 24 h"])
        with panel("Running", flush=True):
            self._running = Block(
                [
                    Column("name", "Job"),
                    Column("method", "Method", wide=True),
                    Column("model", "Model", wide=True),
                    Column("progress", "Step"),
                    Column("speed", "Speed", "right", wide=True),
                    Column("left", "Ends in", "right"),
                ],
                "Nothing is running",
                "A job that is submitted starts as soon as a device is free.",
                {"New job": "/new"},
            )
        with panel("Waiting", flush=True):
            self._waiting = Block(
                [
                    Column("place", "#", "right"),
                    Column("name", "Job"),
                    Column("status", "Status", wide=True),
                    Column("why", "Why", wraps=True),
                    Column("start", "Starts", "right"),
                ],
                "Nothing is waiting",
                "Whatever has to wait stands here with the reason.",
            )
        self._machines()
        self._failures()

    def _steps(self) -> None:
        with self._first_steps:
            ui.label("Three steps to a model of your own").classes("head")
            with ui.element("p"):
                ui.label("Import a base model, upload a file of examples, and start a job on both.")
            with ui.element("div").classes("actions"):
                go_button("1. Import a model", "/models")
                go_button("2. Upload data", "/data")
                go_button("3. New job", "/new")

    def _failures(self) -> None:
        with panel("Recent failures", flush=True):
            self._failed = Block(
                [
                    Column("name", "Job"),
                    Column("why", "What happened", wraps=True),
                    Column("when", "When", "right"),
                ],
                "No failures",
                "A job that fails stands here with the cause and with what could be done about it.",
            )

    def _machines(self) -> None:
        with panel("Machines", flush=True):
            self._devices = Block(
                [
                    Column("device", "Device"),
                    Column("state", "State"),
                    Column("memory", "Memory", "right"),
                    Column("use", "Use", "right", wide=True),
                    Column("job", "Job"),
                ],
                "No machine has reported yet",
                "A worker reports its devices when it starts: `residency up` runs one.",
            )

    def show(self, state: State) -> None:
        """Show another state in the same places."""
        self._first_steps.set_visibility(not state.has_jobs)
        devices = [device for node in state.nodes or [] for device in node["devices"]]
        used = sum(device["state"] == "leased" for device in devices)
        more = "+" if state.more_waiting else ""
        self._figures.show(
            [
                f"{len(state.running)}",
                f"{len(state.waiting)}{more}",
                UNKNOWN if state.nodes is None else f"{used} of {len(devices)}",
                f"{state.failed_today}",
            ]
        )
        self._running.show([_running_row(job) for job in state.running])
        waiting = sorted(
            state.waiting, key=lambda job: (job["queue_position"] is None, job["queue_position"])
        )
        self._waiting.show([_waiting_row(job) for job in waiting])
        self._failed.show([_failed_row(job) for job in state.failed])
        if state.nodes is None:
            self._devices.say("Machines are shown to admins", "Log in with an admin key to see them.")
        else:
            self._devices.show([row for node in state.nodes for row in _device_rows(node)])


class Figures:
    """Large numbers in a row."""

    def __init__(self, names: list[str]) -> None:
        with ui.element("div").classes("figures"):
            self._values = [self._one(name) for name in names]

    @staticmethod
    def _one(name: str) -> ui.label:
        with ui.element("div").classes("figure"):
            value = ui.label(UNKNOWN).classes("value number")
            ui.label(name).classes("soft small")
        return value

    def show(self, values: list[str]) -> None:
        """Show other numbers."""
        for label, value in zip(self._values, values, strict=True):
            label.set_text(value)


class Block:
    """A table, or what stands there while it has no rows."""

    def __init__(
        self, columns: list[Column], nothing: str, hint: str, links: dict[str, str] | None = None
    ) -> None:
        self._table = Table(columns)
        with ui.element("div") as self._empty:
            empty(nothing, hint, links=links)

    def show(self, rows: list[dict[str, Cell]]) -> None:
        """Show these rows."""
        self._table.show(rows)
        self._table.element.set_visibility(bool(rows))
        self._empty.set_visibility(not rows)

    def say(self, head_: str, text: str) -> None:
        """Something else than rows."""
        self.show([])
        self._empty.clear()
        with self._empty:
            empty(head_, text)


def _running_row(job: dict[str, Any]) -> dict[str, Cell]:
    return {
        "id": job["id"],
        "name": words.name_cell(job),
        "method": words.method_of(job),
        "model": job["model"],
        "progress": words.progress_cell(job),
        "speed": words.speed_of(job),
        "left": words.left(job),
    }


def _waiting_row(job: dict[str, Any]) -> dict[str, Cell]:
    starts = job.get("expected_start_at")
    return {
        "id": job["id"],
        "place": words.position_of(job),
        "name": words.name_cell(job),
        "status": pill_of(job["status"]),
        "why": words.why_waiting(job),
        "start": UNKNOWN if starts is None else words.when_cell(starts),
    }


def _failed_row(job: dict[str, Any]) -> dict[str, Cell]:
    diagnosis = job.get("diagnosis") or {}
    advice = (diagnosis.get("suggestion") or {}).get("text", "")
    message = diagnosis.get("message") or (job.get("error") or {}).get("message") or UNKNOWN
    return {
        "id": job["id"],
        "name": words.name_cell(job),
        "why": text_cell(message, note=advice),
        "when": words.when_cell(job["finished_at"]),
    }


def _device_rows(node: dict[str, Any]) -> list[dict[str, Cell]]:
    drained = "" if node["state"] == "active" else ", draining"
    seen = f"{node['name']}{drained} · {size(node['free_bytes'])} free · seen {ago(node['last_seen_at'])}"
    return [
        {
            "id": f"{node['name']}/{device['id']}",
            "device": text_cell(f"{device['kind']} {device['id']}", note=seen),
            "state": pill_of(device["state"]) | {"title": device["reason"] or ""},
            "memory": words.memory_cell(device.get("memory_used_bytes"), device["memory_bytes"]),
            "use": _use_cell(device.get("utilization")),
            "job": words.id_cell(device["held_by"]) if device["held_by"] else UNKNOWN,
        }
        for device in node["devices"]
    ]


def _use_cell(use: float | None) -> Cell:
    return UNKNOWN if use is None else text_cell(percent(use), bar=use)
