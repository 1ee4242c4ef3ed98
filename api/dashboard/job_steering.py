"""The buttons that steer a job, and what stands over a failed one: why, and what could be done."""

from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui

from api.dashboard import job_words as words
from api.dashboard.client import Api
from api.dashboard.elements import go_button
from api.dashboard.formats import plain
from api.dashboard.live import act

_BUSY = ("running", "queued", "waiting", "validating_files", "paused")


class Steering:
    """Pause, resume, cancel, retry, clone: those that the job's status allows."""

    def __init__(self, api: Api, job: dict[str, Any], *, changed: Callable[[], Awaitable[None]]) -> None:
        self._api, self._id, self._changed = api, job["id"], changed
        self._resume = ui.button("Resume", on_click=lambda: self._ask("resume", "The job is queued again."))
        self._pause = ui.button(
            "Pause", on_click=lambda: self._ask("pause", "The job saves a checkpoint and pauses.")
        ).props("outline")
        self._retry = ui.button("Retry", on_click=lambda: retry(api, self._id)).props("outline")
        go_button("Clone", f"/new?from={self._id}")
        self._cancel = ui.button("Cancel", on_click=self._confirm_cancel).props("outline color=negative")

    def show(self, job: dict[str, Any]) -> None:
        """Offer what fits."""
        status = job["status"]
        self._resume.set_visibility(status == "paused")
        self._pause.set_visibility(status in ("running", "queued"))
        self._retry.set_visibility(status in ("failed", "cancelled"))
        self._cancel.set_visibility(status in _BUSY)

    async def _ask(self, verb: str, done: str) -> None:
        if await act(self._api.post(words.url_of(self._id, verb)), done=done):
            await self._changed()

    async def _confirm_cancel(self) -> None:
        with ui.dialog() as dialog, ui.card():
            ui.label("Cancel this job?").classes("strong")
            ui.label("It stops and makes no model. Its checkpoints stay, and a retry goes on from them.")
            with ui.element("div").classes("actions"):
                ui.button("Cancel the job", on_click=lambda: dialog.submit(True)).props("color=negative")
                ui.button("Go on", on_click=lambda: dialog.submit(False)).props("outline")
        if await dialog:
            await self._ask("cancel", "The job is being cancelled.")
        dialog.delete()


class Trouble:
    """Why a job failed and what to do about it. Takes no room otherwise."""

    def __init__(self, api: Api, job_id: str) -> None:
        self._api, self._id = api, job_id
        self._changes: dict[str, Any] = {}
        with ui.element("div").classes("notice bad") as self._root, ui.element("div").classes("stack grow"):
            self._message = ui.label().classes("strong")
            self._advice = ui.label()
            self._values = ui.label().classes("mono small")
            with ui.element("div").classes("actions") as self._offer:
                ui.button("Retry as suggested", on_click=self._retry_as_suggested).props("dense")
        self._root.set_visibility(False)

    def show(self, job: dict[str, Any]) -> None:
        """Show the diagnosis of a failed job."""
        diagnosis = job.get("diagnosis") or {}
        error = job.get("error") or {}
        self._root.set_visibility(job["status"] == "failed")
        self._message.set_text(diagnosis.get("message") or error.get("message") or "The job failed.")
        suggestion = diagnosis.get("suggestion") or {}
        self._advice.set_text(suggestion.get("text", ""))
        self._changes = _hyperparameters_in(suggestion.get("changes") or {}, words.method_of(job))
        told = ", ".join(f"{name} = {plain(value)}" for name, value in self._changes.items())
        self._values.set_text(told)
        self._values.set_visibility(bool(told))
        self._offer.set_visibility(bool(self._changes))

    async def _retry_as_suggested(self) -> None:
        await retry(self._api, self._id, changes=self._changes)


async def retry(api: Api, job_id: str, *, changes: dict[str, Any] | None = None) -> None:
    """Try a job again, as a new one, and go to that one's page."""
    body = {"hyperparameters": changes} if changes else {}
    if made := await act(api.post(words.url_of(job_id, "retry"), body)):
        ui.navigate.to(words.path_of(made["id"]))


def _hyperparameters_in(changes: dict[str, Any], method: str) -> dict[str, Any]:
    """The suggested hyperparameters by name; nothing if more than these is to be changed."""
    prefix = f"method.{method}.hyperparameters."
    if not all(path.startswith(prefix) for path in changes):
        return {}
    return {path.removeprefix(prefix): value for path, value in changes.items()}
