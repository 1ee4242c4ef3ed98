"""New job: a form made of what `GET /v1/methods` tells, with the data beside it; checked, then sent."""

import json
import shlex
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Query
from nicegui import ui

from api.dashboard import server
from api.dashboard.client import Api, Refused, Trouble, locate
from api.dashboard.elements import empty, panel
from api.dashboard.formats import number
from api.dashboard.frame import head, page
from api.dashboard.job_data import DataPreview
from api.dashboard.live import act
from api.dashboard.parameters import Fields

_JOBS = "/v1/fine_tuning/jobs"
_VALIDATION = {"none": "None", "split": "A part of the rows", "file": "Another file"}
_MOST_FILES = 300


@page("/new", title="New job")
async def new_job(api: Api, file: str = "", source: Annotated[str, Query(alias="from")] = "") -> None:
    """The form: empty, with a file, or as another job was."""
    job = await api.get(locate("fine_tuning", "jobs", source)) if source else None
    methods = (await api.get("/v1/methods"))["data"]
    models = [one["id"] for one in await api.list_all("/v1/models") if one.get("status") == "ready"]
    files = await api.list_all("/v1/files", purpose="fine-tune", at_most=_MOST_FILES)
    with head("New job", note=f"As {job['id']} was" if job else ""):
        pass
    if not models:
        empty("No base model yet", "Import one to train it.", links={"Models": "/models"})
        return
    if not files:
        empty("No training file yet", "Upload one; its rows are checked at once.", links={"Upload": "/data"})
        return
    wanted = {file} if job is None else {job["training_file"], job["validation_file"]}
    known = {one["id"] for one in files}
    files += [await api.get(locate("files", one)) for one in wanted if one and one not in known]
    form = NewJob(api, methods=methods, models=models, files=files)
    if job is not None:
        form.copy(job)
    elif file:
        form.training_file.value = file
    await form.begin()


class NewJob:
    """The fields and what is made of them."""

    def __init__(
        self, api: Api, *, methods: list[dict[str, Any]], models: list[str], files: list[dict[str, Any]]
    ) -> None:
        self._api = api
        self._methods = {method["name"]: method for method in methods}
        self._ready = False
        self.grader: ui.textarea | None = None
        self._grader_text = ""  # kept while another method is looked at
        self._kept: dict[str, Any] = {}  # what the job that is copied has and the form does not ask for
        choices = {"": "Choose"} | {one["id"]: _name_of(one) for one in files}
        with ui.element("div").classes("two-columns"):
            with ui.element("div").classes("stack").style("gap: 16px"):
                self._ask_what(models, choices)
                with panel("Hyperparameters"):
                    ui.label("What is left empty is as the grey text says.").classes("soft small")
                    self._place = ui.element("div").classes("stack full-width")
                self._send()
            self.data = DataPreview(api)
        self._rebuild({})

    def _ask_what(self, models: list[str], files: dict[str, str]) -> None:
        names = list(self._methods)
        first = "supervised" if "supervised" in names else names[0]
        with panel("What to train"):
            self.method = ui.select(names, value=first, label="Method", on_change=self._turn_to)
            self._summary = ui.label().classes("soft small")
            with ui.element("div").classes("grid").style("--least: 230px"):
                self.model = ui.select(models, value=models[0], label="Base model", on_change=self._changed)
                self.suffix = ui.input("Suffix", placeholder="none", on_change=self._changed)
            self.training_file = ui.select(files, value="", label="Training file", on_change=self._choose)
            with ui.element("div").classes("grid").style("--least: 230px"):
                self.validation = ui.select(
                    _VALIDATION, value="none", label="Validation", on_change=self._changed
                )
                self.percent = ui.input("Percent of the rows", value="5", on_change=self._changed)
                self.validation_file = ui.select(
                    files, value="", label="Validation file", on_change=self._changed
                )
        self.suffix.props["hint"] = "Goes into the name of the new model"
        for element in (self.method, self.model, self.suffix, self.training_file):
            element.props("stack-label").classes("full-width")
        for element in (self.validation, self.percent, self.validation_file):
            element.props("stack-label").classes("full-width")

    def _send(self) -> None:
        with panel():
            self._fault = ui.label().classes("bad wrap").props("role=alert")
            self._fault.set_visibility(False)
            with ui.element("div").classes("actions"):
                self._start = ui.button("Start the job", on_click=self._submit)
            with ui.expansion("The same with curl").classes("full-width"):
                self._curl = ui.html("", sanitize=False, tag="pre").classes("log")

    async def begin(self) -> None:
        """Show what the chosen file holds."""
        self._ready = True
        await self._choose()

    def copy(self, job: dict[str, Any]) -> None:
        """Fill the form in as another job was."""
        method = job["method"]
        self.method.value = method["type"]
        inner = dict(method.get(method["type"]) or {})
        hyperparameters = inner.pop("hyperparameters", None) or {}
        self._rebuild(hyperparameters)
        if inner.get("grader") and self.grader is not None:
            self.grader.value = json.dumps(inner["grader"], indent=1)
        if job["model"] in (self.model.options or []):
            self.model.value = job["model"]
        self.training_file.value = job["training_file"]
        self.suffix.value = job["user_provided_suffix"] or ""
        if job["validation_file"]:
            self.validation.value, self.validation_file.value = "file", job["validation_file"]
        elif hyperparameters.get("validation_split_percentage"):
            self.validation.value = "split"
            self.percent.value = number(hyperparameters["validation_split_percentage"])
        kept = {name: job.get(name) for name in ("metadata", "on_oom", "priority", "training_files")}
        self._kept = {name: value for name, value in kept.items() if value}
        if job["resources"].get("processes", 1) != 1:
            self._kept["resources"] = job["resources"]

    def body(self, *, tell: bool) -> tuple[dict[str, Any], bool]:
        """(the request, whether all fields fit). With `tell`, faults are told at their fields."""
        hyperparameters, fits = self._fields.read(tell=tell)
        inner: dict[str, Any] = {"hyperparameters": hyperparameters}
        body: dict[str, Any] = {"model": self.model.value, "training_file": self.training_file.value}
        if self.validation.value == "split":
            try:
                hyperparameters["validation_split_percentage"] = float(self.percent.value or "")
            except ValueError:
                fits = self._blame(self.percent, "Give a number up to 50.", tell=tell)
        elif self.validation.value == "file":
            body["validation_file"] = self.validation_file.value
            if not self.validation_file.value:
                fits = self._blame(self.validation_file, "Choose a file, or none.", tell=tell)
        if self.grader is not None and (self.grader.value or "").strip():
            try:
                inner["grader"] = json.loads(self.grader.value or "")
            except ValueError as problem:
                fits = self._blame(self.grader, f"Not JSON: {problem}.", tell=tell)
        if self.suffix.value:
            body["suffix"] = self.suffix.value
        body["method"] = {"type": self.method.value, self.method.value: inner}
        if self._kept.get("training_files", [{}])[0].get("file") not in (None, self.training_file.value):
            self._kept.pop("training_files")
        return self._kept | body, fits & self._fits_data(tell=tell)

    def _fits_data(self, *, tell: bool) -> bool:
        file = self.data.file
        if file is None:
            return self._blame(self.training_file, "Choose a training file.", tell=tell)
        if file["status"] == "error":
            return self._blame(
                self.training_file, f"Mend this file first: {file['status_details']}", tell=tell
            )
        taken = [row["name"] for row in self._methods[self.method.value]["row_formats"]]
        if self.data.format is not None and self.data.format not in taken:
            told = f"Its rows are '{self.data.format}'; {self.method.value} takes {', '.join(taken)}."
            return self._blame(self.training_file, told, tell=tell)
        return True

    def _blame(self, element: Any, message: str, *, tell: bool) -> bool:
        if tell:
            element.error = message
        return False

    def _turn_to(self) -> None:
        if self._ready:
            self._rebuild(self._fields.read(tell=False)[0])
            self.training_file.error = None  # what another method said of it
            self._fits_data(tell=self.data.file is not None)

    def _rebuild(self, values: dict[str, Any]) -> None:
        """The fields of the method that is chosen, with what of `values` it knows."""
        method = self._methods[self.method.value]
        self._summary.set_text(method["summary"])
        if self.grader is not None:
            self._grader_text = self.grader.value or ""
        self._place.clear()
        self.grader = None
        with self._place:
            if method["grader"]:
                self.grader = ui.textarea("grader", on_change=self._changed).props("autogrow stack-label")
                self.grader.classes("full-width").props["hint"] = "Scores answers; as JSON"
                self.grader.value = self._grader_text
            self._fields = Fields(method, changed=self._changed)
        self._fields.write(values)
        self._changed()

    async def _choose(self) -> None:
        if self._ready:
            await act(self.data.choose(str(self.training_file.value or "")))
            self.training_file.error = None
            self._fits_data(tell=self.data.file is not None)
            self._changed()

    def _changed(self) -> None:
        self._fault.set_visibility(False)
        self.percent.set_visibility(self.validation.value == "split")
        self.validation_file.set_visibility(self.validation.value == "file")
        self.data.watch(model=str(self.model.value or ""), method=str(self.method.value))
        self._curl.set_content(_escape(_as_curl(self.body(tell=False)[0])))

    async def _submit(self) -> None:
        body, fits = self.body(tell=True)
        if not fits:
            self._tell("Look at the fields that are marked.")
            return
        self._start.disable()
        try:
            job = await self._api.post(_JOBS, body)
        except Trouble as trouble:
            if isinstance(trouble, Refused) and self._place_fault(trouble):
                self._tell("The server refused this. Look at the field that is marked.")
            else:
                self._tell(str(trouble))
            return
        finally:
            self._start.enable()
        ui.navigate.to(f"/jobs/{quote(job['id'], safe='')}")

    def _place_fault(self, refused: Refused) -> bool:
        """Tell a refusal at its field; whether there is one."""
        name = (refused.param or "").rpartition(".")[2]
        own = {
            "model": self.model,
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "validation_split_percentage": self.percent,
            "suffix": self.suffix,
        }
        if ".grader" in (refused.param or "") and self.grader is not None:
            self.grader.error = str(refused)
            return True
        if name in own and own[name].visible:
            own[name].error = str(refused)
            return True
        return self._fields.blame(name, str(refused))

    def _tell(self, text: str) -> None:
        self._fault.set_text(text)
        self._fault.set_visibility(True)


def _name_of(file: dict[str, Any]) -> str:
    state = {"uploaded": "being checked", "error": "has faults"}.get(file["status"])
    return f"{file['filename']} \N{MIDDLE DOT} {state or number(file['rows']) + ' rows'}"


def _as_curl(body: dict[str, Any]) -> str:
    return (
        f"curl {shlex.quote(server.url().rstrip('/') + _JOBS)} \\\n"
        '  -H "Authorization: Bearer $RESIDENCY_API_KEY" -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(json.dumps(body, indent=1, ensure_ascii=False))}"
    )


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
