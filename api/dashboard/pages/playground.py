"""Playground: a conversation with one model, or with two side by side; votes between answers become data."""

import asyncio
from typing import Any

from nicegui import ui

from api.dashboard.client import Api
from api.dashboard.conversation import Message, Turn
from api.dashboard.elements import empty, panel, row
from api.dashboard.formats import number
from api.dashboard.frame import head, page
from api.dashboard.live import act

_NOBODY = ""
_MOST_COUNTED = 1000


@page("/playground", title="Playground")
async def playground(api: Api, model: str = "", other: str = "") -> None:
    """Choose, ask, read, compare."""
    ready = [found["id"] for found in await api.list_all("/v1/models") if found["status"] == "ready"]
    if not ready:
        head("Playground")
        empty(
            "No model to talk to yet",
            "Import a base model, or train one; every model that is ready can be asked here.",
            links={"Models": "/models"},
        )
        return
    view = Playground(api, ready, model=model, other=other)
    await view.count_votes()


class Playground:
    """The choices, the conversation so far, and where one writes."""

    def __init__(self, api: Api, ready: list[str], *, model: str, other: str) -> None:
        self._api = api
        self._turn: Turn | None = None
        self._history: list[Message] = []
        self._running: asyncio.Task[None] | None = None
        with head("Playground"):
            ui.button("New conversation", on_click=self._start_anew).props("outline")
        with panel():
            self._choose(ready, model=model, other=other)
        self._conversation = ui.element("div").classes("conversation")
        with self._conversation:
            self._hint = ui.label("Ask something. With a second model, both answer side by side.")
            self._hint.classes("soft")
        with panel():
            self._input = ui.textarea(placeholder="Your message").props(
                'outlined autogrow aria-label="Message" input-style="max-height: 200px"'
            )
            self._input.classes("full-width").on("keydown.enter.prevent.exact", self._send)
            with row():
                self._send_button = ui.button("Send", on_click=self._send)
                self._stop_button = ui.button("Stop", on_click=self._stop).props("outline")
                ui.label("Enter sends, Shift+Enter starts a new line.").classes("soft small wide-only")
        self._stop_button.set_enabled(False)
        ui.context.client.on_delete(self._stop)
        with panel("Votes") as votes, votes.actions:
            self._export = ui.button("Export votes as training file", on_click=self._export_votes)
            self._export.props("outline dense")
        with votes:
            self._votes = ui.label().classes("soft")

    def _choose(self, ready: list[str], *, model: str, other: str) -> None:
        with row().classes("filters-in"):
            self._model = ui.select(ready, value=model if model in ready else ready[0], label="Model")
            others = {_NOBODY: "nobody", **{name: name for name in ready}}
            self._other = ui.select(others, value=other if other in ready else _NOBODY, label="Compare with")
            for select in (self._model, self._other):
                select.classes("grow model-choice")
        with ui.expansion("Parameters").classes("full-width"), ui.element("div").classes("stack"):
            self._system = ui.textarea("System prompt").props("autogrow").classes("full-width")
            with row():
                self._numbers = {
                    "temperature": ui.number("Temperature", value=0.7, min=0, max=2, step=0.1),
                    "top_p": ui.number("Top p", value=1.0, min=0.01, max=1, step=0.05),
                    "max_completion_tokens": ui.number("Most tokens", value=256, min=1, step=1, precision=0),
                    "seed": ui.number("Seed", min=0, step=1, precision=0),
                }

    def _parameters(self) -> dict[str, Any]:
        given = {name: field.value for name, field in self._numbers.items() if field.value is not None}
        whole = ("max_completion_tokens", "seed")
        return {name: int(value) if name in whole else float(value) for name, value in given.items()}

    async def _send(self) -> None:
        text = (self._input.value or "").strip()
        if not text or self._running is not None:
            return
        self._input.set_value("")
        self._hint.set_visibility(False)
        if self._turn is not None:
            self._history.append({"role": "assistant", "content": self._turn.close().text})
        self._history.append({"role": "user", "content": text})
        system = (self._system.value or "").strip()
        asked = [{"role": "system", "content": system}] if system else []
        models = [self._model.value, *([self._other.value] if self._other.value else [])]
        with self._conversation:
            self._turn = Turn(self._api, [*asked, *self._history], models, voted=self.count_votes)
        self._running = asyncio.create_task(self._turn.run(self._parameters()))
        self._set_running(True)
        await asyncio.wait([self._running])
        self._running = None
        self._set_running(False)

    def _set_running(self, runs: bool) -> None:
        self._send_button.set_enabled(not runs)
        self._stop_button.set_enabled(runs)

    def _stop(self) -> None:
        if self._running is not None:
            self._running.cancel()

    def _start_anew(self) -> None:
        self._stop()
        self._history, self._turn = [], None
        self._conversation.clear()
        with self._conversation:
            self._hint = ui.label("Ask something. With a second model, both answer side by side.")
            self._hint.classes("soft")

    async def count_votes(self) -> None:
        """Say how many votes there are."""
        count = len(await self._api.list_all("/v1/votes", at_most=_MOST_COUNTED, limit=100))
        more = " or more" if count == _MOST_COUNTED else ""
        self._votes.set_text(
            f"{number(count)}{more} so far. `reward` and `dpo` train on them as they are."
            if count
            else "None yet. Let two models answer the same message and say which answer is better."
        )
        self._export.set_enabled(bool(count))

    async def _export_votes(self) -> None:
        file = await act(self._api.post("/v1/votes/export"))
        if file is not None:
            ui.navigate.to(f"/data/{file['id']}")
