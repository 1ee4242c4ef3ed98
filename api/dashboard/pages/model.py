"""Model: where it comes from, what it answered before and after, its engine, its files."""

from typing import Any

from nicegui import ui

from api.dashboard import model_words as words
from api.dashboard.client import Api, locate
from api.dashboard.elements import Facts, Pill, empty, go_button, grid, link, panel, row
from api.dashboard.formats import UNKNOWN, moment, number, size
from api.dashboard.frame import head, page
from api.dashboard.live import Live, act, live
from api.dashboard.table import Cell, Column, Table, text_cell

_EVERY_S = 3.0


@page("/models/{model_id:path}", title="Model", within="/models")
async def show_model(api: Api, model_id: str) -> None:
    """A model."""
    model = await api.get(locate("models", model_id))
    ui.page_title(f"{model['id']} · Residency")
    with head(model["id"], note=_made_from(model)):
        go_button("Chat with it", words.chat_path(model["id"]), main=True)
        deleter = Deleter(api, model)
    with grid(least_px=380):
        with panel("Model"):
            facts = Facts(_facts_of(model))
            pill = Pill(model["status"])
        engine = Engine(api, model["id"])
    with panel("Lineage"):
        _draw_lineage(model)
    with panel("Before and after", flush=True):
        _draw_evaluation(model)
    await _draw_files(api, model)

    async def fetch() -> tuple[words.Model, words.Deployment | None]:
        return await api.get(locate("models", model["id"])), await engine.fetch()

    def show(found: tuple[words.Model, words.Deployment | None]) -> None:
        facts.show(_facts_of(found[0]))
        pill.set_status(found[0]["status"])
        engine.show(found[1])
        deleter.show(found[0])

    engine.live = await live(fetch, show, every_s=_EVERY_S)


class Engine:
    """Whether the model answers, and the buttons that change that."""

    live: Live

    def __init__(self, api: Api, model_id: str) -> None:
        self._api, self._model_id = api, model_id
        self._deployment: dict[str, Any] | None = None
        with panel("Engine"):
            with row():
                self._pill = Pill("stopped")
                self._told = ui.label().classes("soft grow")
            with row():
                self._deploy = ui.button("Deploy", on_click=self._start).props("outline")
                self._undeploy = ui.button("Undeploy", on_click=self._stop).props("outline")

    async def fetch(self) -> words.Deployment | None:
        """Its live deployment."""
        return (await words.read_deployments(self._api)).get(self._model_id)

    def show(self, found: words.Deployment | None) -> None:
        """Show its state in place."""
        self._deployment = found
        status = self._deployment["status"] if self._deployment else "stopped"
        self._pill.set_status(status)
        self._deploy.set_enabled(self._deployment is None or status == "failed")
        self._undeploy.set_enabled(self._deployment is not None)
        self._told.set_text(_engine_words(self._deployment))

    async def _start(self) -> None:
        await act(self._api.post("/v1/deployments", {"model": self._model_id}))
        await self.live.refresh()

    async def _stop(self) -> None:
        if self._deployment is not None:
            await act(self._api.delete(locate("deployments", self._deployment["id"])))
            await self.live.refresh()


class Deleter:
    """Deletes a model after asking; the page then leads back to the list."""

    def __init__(self, api: Api, model: dict[str, Any]) -> None:
        self._api, self._model = api, model
        with ui.dialog() as self._dialog, ui.card():
            ui.label(f"Delete {model['id']}?").classes("strong wrap")
            ui.label("Its weights are removed from the disk. Models made from it stay.").classes("soft")
            with row():
                ui.button("Delete", on_click=self._delete).props("color=negative")
                ui.button("Cancel", on_click=self._dialog.close).props("outline")
        self._button = ui.button("Delete", on_click=self._dialog.open).props("outline color=negative")

    def show(self, model: dict[str, Any]) -> None:
        """Checkpoints belong to their jobs, and what is being imported cannot be deleted."""
        self._button.set_enabled(model["kind"] != "checkpoint" and model["status"] != "importing")

    async def _delete(self) -> None:
        self._dialog.close()
        if await act(self._api.delete(locate("models", self._model["id"]))) is not None:
            ui.navigate.to("/models")


def _made_from(model: dict[str, Any]) -> str:
    return f"made from {model['parent']}" if model["parent"] else "a base model"


def _facts_of(model: dict[str, Any]) -> dict[str, str]:
    details = model["details"] or {}
    return {
        "Parameters": number(details.get("parameters")),
        "Architecture": str(details.get("architecture") or details.get("model_type") or UNKNOWN),
        "Weights": size(details.get("bytes")),
        "Context": UNKNOWN if model["max_model_len"] is None else f"{number(model['max_model_len'])} tokens",
        "Since": moment(model["created"]),
        "Digest": model["digest"] or UNKNOWN,
        **({"Problem": model["error"]["message"]} if model["error"] else {}),
    }


def _engine_words(deployment: dict[str, Any] | None) -> str:
    if deployment is None:
        return "Nothing is loaded. A chat in the playground loads it."
    if deployment["error"]:
        return str(deployment["error"].get("message"))
    if deployment["status"] == "ready":
        return "It answers." + (" It gives way to others when it idles." if deployment["auto"] else "")
    return "It is being loaded."


def _draw_lineage(model: dict[str, Any]) -> None:
    steps = model.get("lineage") or []
    with ui.element("ol").classes("chain"):
        for step in steps:
            is_here = step["model"] == model["id"]
            with ui.element("li").classes("here" if is_here else ""):
                if is_here or step["deleted"]:
                    ui.label(step["model"] + (" (deleted)" if step["deleted"] else "")).classes("strong")
                else:
                    link(step["model"], words.path_of(step["model"]))
                if step["job_id"]:
                    with row().classes("small soft"):
                        ui.label(f"made by {step['method']} in job")
                        link(step["job_id"], f"/jobs/{step['job_id']}")


def _draw_evaluation(model: dict[str, Any]) -> None:
    steps = (model.get("evaluation") or {}).get("steps") or []
    if len(steps) < 2:
        empty(
            "Nothing was measured",
            "A job with `eval_prompts` or a validation file shows here what its model answered and how well "
            "it did before the first step and after the last.",
        )
        return
    before, after = steps[0], steps[-1]
    numbers = [name for name in after if isinstance(after[name], int | float) and name != "step"]
    if numbers:
        measured = Table(
            [
                Column("name", "Measure"),
                Column("before", "Before", "right"),
                Column("after", "After", "right"),
            ]
        )
        measured.show(
            [
                {
                    "id": name,
                    "name": name.replace("_", " "),
                    "before": number(before.get(name)),
                    "after": number(after[name]),
                }
                for name in numbers
            ]
        )
    earlier = {str(one["prompt"]): one["answer"] for one in before.get("answers") or []}
    rows: list[dict[str, Cell]] = [
        {
            "id": str(i),
            "prompt": str(one["prompt"]),
            "before": (earlier.get(str(one["prompt"])) or "").strip() or UNKNOWN,
            "after": one["answer"].strip() or "(nothing)",
        }
        for i, one in enumerate(after.get("answers") or [])
    ]
    if rows:
        Table(
            [
                Column("prompt", "Prompt", wraps=True),
                Column("before", "Answer before", wraps=True),
                Column("after", "Answer after", wraps=True),
            ]
        ).show(rows)


async def _draw_files(api: Api, model: dict[str, Any]) -> None:
    with panel("Files", flush=True):
        files = []
        if model["status"] == "ready":
            files = (await api.get(locate("models", model["id"], "files")))["data"]
        if not files:
            empty("No files yet", "They are here once the model is ready.")
            return
        Table([Column("name", "File", wraps=True), Column("size", "Size", "right")]).show(
            [
                {
                    "id": one["id"],
                    "name": text_cell(
                        one["name"],
                        href=words.file_path(model["id"], one["name"]),
                        title="Download",
                    ),
                    "size": size(one["bytes"]),
                }
                for one in files
            ]
        )
