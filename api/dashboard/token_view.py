"""What a model and a method make of a file: token by token with the loss mask, and how many there are."""

import html
import time
from typing import Any

from nicegui import ui

from api.dashboard.client import Api, Refused, Trouble, locate
from api.dashboard.elements import Facts, notice
from api.dashboard.formats import number, percent
from api.dashboard.histogram import Histogram

_WAIT_S = 10.0  # of one request; a client of ours gives up after 20
_PATIENCE_S = 180.0
_SHOWN_AS = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n", "\t": "\N{RIGHTWARDS ARROW}\t"}


async def ask_worker(api: Api, path: str, **params: Any) -> dict[str, Any]:
    """An answer for which a worker reads the file: asked again until it is there. Raises Trouble."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return await api.get(path, wait=_WAIT_S, **params)
        except Refused as refused:
            if refused.code != "preview_pending" or time.monotonic() > until:
                raise


class TokenRows:
    """One row as training sees it."""

    def __init__(self) -> None:
        self._facts = Facts()
        with ui.element("div").classes("row-of small soft"):
            ui.html('<span class="token trained">trained</span> the loss is measured on it', sanitize=False)
            ui.html('<span class="token">read</span> only read', sanitize=False)
        with ui.element("div") as self._fault:
            self._reason = ui.label().classes("bad wrap")
        self._texts = ui.element("div").classes("stack full-width")

    def show(self, preview: dict[str, Any]) -> None:
        """Show the first row of an answer of `preview`."""
        row = preview["rows"][0] if preview["rows"] else None
        self._fault.set_visibility(row is None or bool(row["error"]))
        self._texts.clear()
        if row is None:
            self._reason.set_text("The file has no such row.")
            return
        self._reason.set_text(row["error"] or "")
        cut = f", cut from {number(row['full_tokens'])}" if row["truncated"] else ""
        self._facts.show(
            {
                "Line": number(row["line"]),
                "Tokens": f"{number(row['tokens'])}{cut}",
                "Trained": number(row["trainable_tokens"]),
            }
        )
        with self._texts:
            for text in row["texts"]:
                ui.label(text["name"]).classes("strong small")
                ui.html(_tokens(text), sanitize=False, tag="pre").classes("tokens")
            for note in preview["notes"]:
                notice(note)


class TokenCounts:
    """How many tokens the rows take, and what share of them is cut and trained."""

    def __init__(self) -> None:
        self._facts = Facts()
        ui.label("Rows by their length in tokens").classes("soft small")
        self._histogram = Histogram("Rows by their length in tokens")

    def show(self, found: dict[str, Any]) -> None:
        """Show an answer of `tokens`."""
        sample = f", a sample of {number(found['measured_rows'])}" if found["sampled"] else ""
        lengths = ", ".join(f"{name} % up to {number(value)}" for name, value in found["percentiles"].items())
        self._facts.show(
            {
                "Rows": f"{number(found['rows'])}{sample}",
                "Tokens": number(found["tokens"]),
                "Trained": f"{number(found['trainable_tokens'])} ({percent(found['trainable_share'])})",
                "Cut": f"{number(found['truncated'])} rows ({percent(found['truncated_share'])})",
                "Left out": f"{number(found['dropped'])} without a token to train on",
                "Lengths": lengths.replace("p", ""),
            }
        )
        buckets = found["histogram"]
        self._histogram.show(
            [
                (f"\N{LESS-THAN OR EQUAL TO}{number(b['up_to'])}" if b["up_to"] else "longer", b["count"])
                for b in buckets
            ]
        )


class TokenView:
    """The panel's inside: choose a model, a method and a row, and look."""

    def __init__(self, api: Api, file_id: str, *, models: list[str], methods: list[str]) -> None:
        self._api, self._file_id = api, file_id
        with ui.element("div").classes("row-of"):
            self._model = ui.select(models, value=models[0], label="Model").classes("grow")
            self._method = ui.select(methods, value=methods[0], label="Method").classes("grow")
            self._row = ui.number("Row", value=1, min=1, precision=0).style("width: 96px")
            self._button = ui.button("Show tokens", on_click=self.look)
        self._said = ui.label().classes("soft").props("role=status")
        self._said.set_text("Shows one row token by token, and counts those of all rows.")
        with ui.element("div").classes("stack full-width") as self._answers:
            self._rows = TokenRows()
            ui.separator()
            self._counts = TokenCounts()
        self._answers.set_visibility(False)

    async def look(self) -> None:
        """Ask, and show the answers or why there are none."""
        asked = {"model": self._model.value, "method": self._method.value}
        self._button.disable()
        self._said.set_text("A worker is looking at the file; the first time takes some seconds.")
        try:
            row = int(self._row.value or 1)
            preview = await ask_worker(self._api, locate("files", self._file_id, "preview"), row=row, **asked)
            self._rows.show(preview)
            self._answers.set_visibility(True)
            self._said.set_text("The tokens of all rows are being counted.")
            counts = await ask_worker(self._api, locate("files", self._file_id, "tokens"), **asked)
            self._counts.show(counts)
        except Trouble as trouble:
            self._said.set_text(str(trouble))
            return
        finally:
            self._button.enable()
        self._said.set_text(f"As {asked['method']} of {asked['model']} sees it.")


def _tokens(text: dict[str, Any]) -> str:
    shown = "".join(
        f'<span class="token{" trained" if token["trained"] else ""}" title="{token["id"]}">'
        f"{_visible(token)}</span>"
        for token in text["tokens"]
    )
    left_out = text["tokens_left_out"]
    return shown + (f'<span class="faint"> and {number(left_out)} more</span>' if left_out else "")


def _visible(token: dict[str, Any]) -> str:
    shown = token["text"] or (f"<{token['bytes']}>" if token.get("bytes") else "")
    return html.escape("".join(_SHOWN_AS.get(letter, letter) for letter in shown))
