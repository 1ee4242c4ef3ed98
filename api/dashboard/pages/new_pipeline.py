"""New pipeline: YAML in a text area, with what is wrong told at its line."""

from typing import Any

from nicegui import ui

from api.dashboard import pipeline_text
from api.dashboard.client import Api, Refused, Trouble
from api.dashboard.elements import grid, link, panel
from api.dashboard.frame import head, page
from api.dashboard.pipeline_text import Misfit

_RULES = [
    "Each stage is a training: a name, a model, a file and a method with its hyperparameters.",
    "model: {stage: NAME} starts from what another stage makes. So may the hyperparameter reward_model.",
    "Files stand there by the name under which they were uploaded (the newest of them), or by id (file-…).",
    "Stages that ran before with the same inputs are not run again.",
]
_SELECT = """
const area = document.querySelector('.yaml textarea');
const lines = area.value.split('\\n');
const start = lines.slice(0, %d).join('\\n').length + (%d ? 1 : 0);
area.focus({preventScroll: true});
area.setSelectionRange(start, start + lines[%d].length);
area.scrollTop = Math.max(0, %d * 19.5 - area.clientHeight / 2);
"""


# Before /pipelines/{pipeline_id}: modules are found in the order of their names.
@page("/pipelines/new", title="New pipeline", within="/pipelines")
async def new_pipeline(api: Api) -> None:
    """A text area with an example."""
    models = (await api.get("/v1/models"))["data"]
    bases = [model["id"] for model in models if model["status"] == "ready" and model["kind"] == "base"]
    with head("New pipeline", note="Several trainings as one submission, written as YAML"):
        pass
    Editor(api, pipeline_text.EXAMPLE.format(model=bases[0] if bases else "my-base-model"))


class Editor:
    """The text, the button that starts it, and what is wrong with it."""

    def __init__(self, api: Api, example: str) -> None:
        self._api = api
        with ui.element("div").classes("notice bad").props("role=alert") as self._wrong:
            with ui.element("div").classes("stack grow"):
                self._where = ui.label().classes("strong")
                self._message = ui.label().classes("wrap")
        self._wrong.set_visibility(False)
        with grid(least_px=420):
            with panel("YAML") as block:
                self._text = ui.textarea(value=example).classes("full-width yaml")
                self._text.props('rows=27 spellcheck=false aria-label="Pipeline as YAML"')
            with block.actions:
                self._start = ui.button("Start the pipeline", on_click=self._submit).props("dense")
            with panel("How it is written"):
                with ui.element("ul").classes("rules"):
                    for rule in _RULES:
                        with ui.element("li"):
                            ui.label(rule)
                with ui.element("div").classes("row-of"):
                    link("Upload files", "/data")
                    link("Import a model", "/models")
                    link("Methods and their hyperparameters", "/new")
                ui.label(
                    "The same text starts from a shell with `residency run FILE`, "
                    "which uploads files by their paths."
                ).classes("soft small")

    async def _submit(self) -> None:
        self._start.disable()
        try:
            made = await self._create(str(self._text.value or ""))
        except Misfit as misfit:
            self._tell(misfit)
        except Trouble as trouble:
            self._tell(Misfit(str(trouble)))
        else:
            ui.navigate.to(f"/pipelines/{made['id']}")
        finally:
            self._start.enable()

    async def _create(self, written: str) -> dict[str, Any]:
        text = pipeline_text.read(written)
        files = await self._api.list_all("/v1/files", limit=1000, order="desc", at_most=10_000)
        # Newest first, so that the newest of a name stays.
        ids = {file["filename"]: file["id"] for file in reversed(files)}
        try:
            return await self._api.post("/v1/pipelines", pipeline_text.name_files(text, ids))
        except Refused as refused:
            raise text.misfit(str(refused), refused.param) from refused

    def _tell(self, misfit: Misfit) -> None:
        places = [f"Line {misfit.line}" if misfit.line else "", misfit.where]
        self._where.set_text(", ".join(place for place in places if place) or "The pipeline was not started")
        self._message.set_text(str(misfit))
        self._wrong.set_visibility(True)
        if misfit.line:
            line = misfit.line - 1
            ui.run_javascript(_SELECT % (line, line, line, line))
