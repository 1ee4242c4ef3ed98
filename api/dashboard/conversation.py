"""Turns of a conversation with one model or with two side by side: streamed answers, a vote between them."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from nicegui import ui

from api.dashboard.client import Api, Refused, Trouble
from api.dashboard.elements import grid, notice, row
from api.dashboard.formats import number, readable
from api.dashboard.live import act

_CHAT = "/v1/chat/completions"
_LOADING = ("model_loading", "model_not_ready")
_AGAIN_AFTER_S = 2.0
Message = dict[str, str]


class Answer:
    """What one model says, as it says it."""

    def __init__(self, model: str) -> None:
        self.model, self.text = model, ""
        self.is_whole = False
        with ui.element("section").classes("panel answer"):
            with ui.element("div").classes("answer-head"):
                ui.label(model).classes("mono small soft wrap")
                self._told = ui.label("waiting").classes("faint small number")
            self._shown = ui.label().classes("said")
            self._below = ui.element("div")

    async def stream(self, api: Api, body: dict[str, Any]) -> None:
        """Fill it; what goes wrong is told below what has come."""
        try:
            while True:
                try:
                    await self._read(api, body | {"model": self.model})
                    return
                except Refused as refused:
                    if refused.code == "model_not_deployed":  # where a chat alone loads nothing
                        await api.post("/v1/deployments", {"model": self.model})
                    elif refused.code not in _LOADING:
                        raise
                    self._told.set_text("loading the model")
                    await asyncio.sleep(_AGAIN_AFTER_S)
        except Trouble as trouble:
            self._told.set_text("failed")
            with self._below:
                notice(str(trouble), kind="bad")
        except asyncio.CancelledError:
            self._told.set_text("stopped")
            raise

    async def _read(self, api: Api, body: dict[str, Any]) -> None:
        usage: dict[str, Any] = {}
        async with aclosing(api.stream_sse(_CHAT, body)) as frames:
            async for _, data in frames:
                usage = data.get("usage") or usage
                for choice in data.get("choices") or []:
                    self.text += readable(choice["delta"].get("content") or "")
                self._shown.set_text(self.text.strip())
                self._told.set_text("answers")
        self.is_whole = True
        if not self.text.strip():
            self._shown.set_text("(nothing)")
        self._told.set_text(f"{number(usage.get('completion_tokens'))} tokens")


class Turn:
    """A question and the answers to it."""

    def __init__(
        self, api: Api, history: list[Message], models: list[str], *, voted: Callable[[], Awaitable[None]]
    ) -> None:
        self._api, self._history, self._on_vote = api, history, voted
        self.chosen: Answer | None = None
        with ui.element("div").classes("turn"):
            ui.label(history[-1]["content"]).classes("asked")
            with grid(least_px=300):
                self.answers = [Answer(model) for model in models]
            with row().classes("vote") as self._vote:
                ui.label("Which answer is better?").classes("soft")
                self._choices = [
                    ui.button(label, on_click=lambda _, answer=answer: self._choose(answer)).props(
                        "outline dense"
                    )
                    for label, answer in zip(("The left one", "The right one"), self.answers, strict=False)
                ]
            self._kept = ui.label().classes("soft small")
        self._vote.set_visibility(False)

    async def run(self, parameters: dict[str, Any]) -> None:
        """Stream all answers at once."""
        body = parameters | {"messages": self._history, "stream": True}
        body["stream_options"] = {"include_usage": True}
        tasks = [asyncio.create_task(answer.stream(self._api, body)) for answer in self.answers]
        try:
            await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
        texts = {answer.text.strip() for answer in self.answers if answer.is_whole}
        self._vote.set_visibility(len(texts - {""}) == 2)

    def close(self) -> Answer:
        """No vote any more: the answer that the conversation goes on with."""
        self._vote.set_visibility(False)
        return self.chosen or self.answers[0]

    async def _choose(self, chosen: Answer) -> None:
        (rejected,) = (answer for answer in self.answers if answer is not chosen)
        sides = {
            name: {"model": answer.model, "content": answer.text}
            for name, answer in (("chosen", chosen), ("rejected", rejected))
        }
        for button in self._choices:
            button.disable()
        if await act(self._api.post("/v1/votes", {"prompt": self._history, **sides})) is None:
            for button in self._choices:
                button.enable()
            return
        self.chosen = chosen
        self._vote.set_visibility(False)
        self._kept.set_text(f"You prefer {chosen.model}. The conversation goes on with its answer.")
        await self._on_vote()
