"""Models: bases and what was trained from them, whether each answers, and the import of a base."""

from typing import Any

from nicegui import ui

from api.dashboard import job_words
from api.dashboard import model_words as words
from api.dashboard.client import Api
from api.dashboard.elements import empty, go_button, panel, pill_of
from api.dashboard.formats import number
from api.dashboard.frame import head, page
from api.dashboard.live import act, live
from api.dashboard.table import Cell, Column, Table, text_cell

_EVERY_S = 4.0
_COLUMNS = [
    Column("name", "Model", wraps=True),
    Column("status", "Files"),
    Column("deployed", "Answers"),
    Column("kind", "Kind", wide=True),
    Column("parent", "Trained from", wide=True),
    Column("context", "Context", "right", wide=True),
    Column("when", "Made", "right", wide=True),
]


@page("/models", title="Models")
async def show_models(api: Api) -> None:
    """The list of models."""
    with head("Models"):
        go_button("New job", "/new")
        if api.is_admin:
            ui.button("Import a model", on_click=lambda: _ask_import(api))
    view = ModelList(api)
    await live(view.fetch, view.show, every_s=_EVERY_S)


class ModelList:
    """Two tables: what was imported, and what training made."""

    def __init__(self, api: Api) -> None:
        self._api = api
        with panel("Base models", flush=True):
            self._bases = Table([column for column in _COLUMNS if column.name not in ("kind", "parent")])
            with ui.element("div") as self._no_base:
                empty(
                    "No base model yet",
                    "Every training starts from one. An admin imports it from a folder of the server.",
                    actions={"Import a model": lambda: _ask_import(api)} if api.is_admin else {},
                )
        with panel("Trained here", flush=True):
            self._results = Table(_COLUMNS)
            with ui.element("div") as self._no_result:
                empty(
                    "No trained model yet",
                    "A job that succeeds leaves its model here, with the way from its base to it.",
                    links={"New job": "/new"},
                )

    async def fetch(self) -> tuple[list[words.Model], dict[str, words.Deployment]]:
        """All models, and which of them are deployed."""
        models = (await self._api.get("/v1/models"))["data"]
        return models, await words.read_deployments(self._api)

    def show(self, found: tuple[list[words.Model], dict[str, words.Deployment]]) -> None:
        """Show them in place, the newest first."""
        models, deployed = found
        rows = [(model["kind"], _row_of(model, deployed.get(model["id"]))) for model in reversed(models)]
        bases = [row for kind, row in rows if kind == "base"]
        results = [row for kind, row in rows if kind != "base"]
        for table, shown, nothing in (
            (self._bases, bases, self._no_base),
            (self._results, results, self._no_result),
        ):
            table.show(shown)
            table.element.set_visibility(bool(shown))
            nothing.set_visibility(not shown)


def _row_of(model: words.Model, deployment: words.Deployment | None) -> dict[str, Cell]:
    parent = model.get("parent")
    state = words.state_of(deployment)
    return {
        "id": model["id"],
        "name": words.name_cell(model),
        "status": pill_of(model["status"]),
        "deployed": pill_of(state) if deployment else text_cell("no", title=words.NOT_DEPLOYED),
        "kind": words.kind_of(model),
        "parent": text_cell(parent, href=words.path_of(parent)) if parent else "",
        "context": number(model["max_model_len"]),
        "when": job_words.when_cell(model["created"]),
    }


async def _ask_import(api: Api) -> None:
    """Ask where the model is and start its import; the list shows how it goes."""
    with ui.dialog() as dialog, ui.card():
        ui.label("Import a model").classes("strong")
        ui.label(
            "From a folder on the server, below one of its import folders, with safetensors or a GGUF file. "
            "Where hubs are allowed also hf://organisation/name@revision."
        ).classes("soft")
        name = ui.input("Name", placeholder="org/model").classes("full-width")
        source = ui.input("Folder or address", placeholder="/models/my-base").classes("full-width")
        base = ui.input("Base, if it is a LoRA adapter").classes("full-width")

        async def start() -> None:
            wanted: dict[str, Any] = {
                "id": (name.value or "").strip(),
                "source": (source.value or "").strip(),
            }
            if (base.value or "").strip():
                wanted["base"] = (base.value or "").strip()
            if await act(api.post("/v1/models/import", wanted), done="The import has started."):
                dialog.submit(True)

        with ui.element("div").classes("actions"):
            ui.button("Import", on_click=start)
            ui.button("Close", on_click=lambda: dialog.submit(False)).props("outline")
    if await dialog:
        ui.navigate.to("/models")
    dialog.delete()
