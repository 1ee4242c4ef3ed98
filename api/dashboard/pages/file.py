"""File: what the check of a training file found, line by line, and what a model sees in it."""

from typing import Any
from urllib.parse import quote

from nicegui import ui

from api.dashboard.client import Api, Refused, locate
from api.dashboard.elements import Bar, Facts, Pill, empty, go_button, notice, panel
from api.dashboard.formats import UNKNOWN, moment, number, percent, plain, size
from api.dashboard.frame import head, page
from api.dashboard.histogram import Parts
from api.dashboard.live import act, live
from api.dashboard.table import Column, Table
from api.dashboard.token_view import TokenView

_EVERY_S = 1.5
_METHODS = "/v1/methods"


@page("/data/{file_id}", title="File", within="/data")
async def show_file(api: Api, file_id: str) -> None:
    """A file, followed until it is checked."""
    file = await api.get(locate("files", file_id))
    ui.page_title(f"{file['filename']} · Residency")
    view = FilePage(api, file)
    followed = await live(view.fetch, view.show, every_s=_EVERY_S)
    view.stop_when_checked(followed.stop)
    if file["purpose"] == "fine-tune":
        await _show_tokens(api, file)


class FilePage:
    """The head, the state and the report."""

    def __init__(self, api: Api, file: dict[str, Any]) -> None:
        self._api, self._id = api, file["id"]
        self._stop: Any = None
        self._is_checked = False
        with head(file["filename"], note=file["id"]):
            go_button("New job with it", f"/new?file={quote(file['id'], safe='')}", main=True)
            ui.button("Delete", on_click=self._ask_to_delete).props("outline color=negative")
        with panel():
            with ui.element("div").classes("job-status"):
                self._pill = Pill("uploaded")
                self._told = ui.label().classes("wrap")
            self._facts = Facts()
        self._report = ui.element("div").classes("stack full-width").style("gap: 16px")

    async def fetch(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The file and, once it is checked, its report."""
        file = await self._api.get(locate("files", self._id))
        if file["status"] == "uploaded" or file["purpose"] != "fine-tune":
            return file, None
        try:
            return file, await self._api.get(locate("files", self._id, "report"))
        except Refused as refused:
            if refused.code != "no_report":
                raise
            return file, None

    def show(self, found: tuple[dict[str, Any], dict[str, Any] | None]) -> None:
        """Show the state in place; the report comes once."""
        file, report = found
        waits = file["status"] == "uploaded"
        self._pill.set_status("validating_files" if waits else file["status"])
        self._told.set_text(
            "The rows are being checked; this page follows." if waits else file["status_details"] or ""
        )
        self._facts.show(
            {
                "Size": size(file["bytes"]),
                "Rows to train on": number(file["rows"]),
                "Purpose": file["purpose"],
                "Uploaded": moment(file["created_at"]),
                "SHA-256": file["sha256"] or UNKNOWN,
                **({"Columns": plain(file["column_map"])} if file["column_map"] else {}),
                **({"From": file["source"]} if file["source"] else {}),
            }
        )
        if not waits and not self._is_checked:
            self._is_checked = True
            if report is not None:
                with self._report:
                    _show_report(report)
            if self._stop:
                self._stop()

    def stop_when_checked(self, stop: Any) -> None:
        """Call `stop` as soon as nothing can change any more."""
        self._stop = stop
        if self._is_checked:
            stop()

    async def _ask_to_delete(self) -> None:
        with ui.dialog() as dialog, ui.card():
            ui.label("Delete this file?").classes("strong")
            ui.label("Its bytes and its report are lost. Models that were trained on it stay.")
            with ui.element("div").classes("actions"):
                ui.button("Delete the file", on_click=lambda: dialog.submit(True)).props("color=negative")
                ui.button("Keep it", on_click=lambda: dialog.submit(False)).props("outline")
        if await dialog and await act(self._api.delete(locate("files", self._id))):
            ui.navigate.to("/data")


def _show_report(report: dict[str, Any]) -> None:
    with ui.element("div").classes("grid").style("--least: 320px"):
        with panel("Rows"):
            Bar(report["rows_used"] / report["rows"] if report["rows"] else 0.0)
            Facts(_counts_of(report))
        with panel("Why rows were refused"):
            if report["reasons"]:
                refused = report["rows_refused"] or 1
                reasons = report["reasons"].items()
                Parts().show([(reason, count / refused, number(count)) for reason, count in reasons])
            else:
                ui.label("No row was refused.").classes("soft")
        with panel("Scripts"):
            scripts = report["sample"]["scripts"]
            Parts().show([(name, share, percent(share)) for name, share in scripts.items()])
            if not scripts:
                ui.label("No letters were found.").classes("soft")
    with panel("Faults", flush=True):
        if report["errors"]:
            with ui.element("div").classes("scrolled"):
                _show_faults(report)
        else:
            empty("No faults", "Every row can be used.")
    _show_likeness(report)
    for code, found in report["notices"].items():
        if not found["count"]:
            continue
        lines = ", ".join(number(line) for line in found["lines"])
        notice(f"{code.replace('_', ' ')}: {number(found['count'])} rows, first on line {lines}", kind="warn")


def _counts_of(report: dict[str, Any]) -> dict[str, str]:
    share = report["rows_used"] / report["rows"] if report["rows"] else None
    return {
        "Used": f"{number(report['rows_used'])} of {number(report['rows'])} ({percent(share)})",
        "Refused": number(report["rows_refused"]),
        "May be wrong": percent(report["max_invalid_fraction"]),
        "Blank lines": number(report["blank_lines"]),
        "Format": report["format"] or UNKNOWN,
        "Rows are": report["kind"] or UNKNOWN,
        "Jobs may use it": "yes" if report["accepted"] else "no",
        **({} if report["whole"] else {"Read": "not to its end"}),
    }


def _show_faults(report: dict[str, Any]) -> None:
    columns = [Column("line", "Line", "right"), Column("message", "What is wrong", wraps=True)]
    table = Table([*columns, Column("reason", "Reason", wide=True)])
    table.show(
        [
            {
                "id": f"{place}",
                "line": number(fault["line"]),
                "message": fault["message"],
                "reason": fault["code"],
            }
            for place, fault in enumerate(report["errors"])
        ]
    )


def _show_likeness(report: dict[str, Any]) -> None:
    same, near = report["duplicates"], report["sample"]["near_duplicates"]
    with panel("Duplicates", flush=True):
        if not same["count"] and not near["count"]:
            empty("No duplicates", "No row is the same as, or much like, an earlier one.")
            return
        told = f"Rows that are the same as an earlier one: {number(same['count'])}. Of a sample of "
        told += f"{number(report['sample']['rows'])}, much like one: {number(near['count'])}."
        ui.label(told).classes("filters full-width")
        table = Table([Column("line", "Line", "right"), Column("like", "Is like line", "right"),
                       Column("how", "How much", "right")])  # fmt: skip
        rows = [(one["line"], one["same_as"], "the same") for one in same["first"]]
        rows += [(one["line"], one["near"], percent(one["similarity"])) for one in near["first"]]
        table.show(
            [
                {"id": str(place), "line": number(line), "like": number(other), "how": how}
                for place, (line, other, how) in enumerate(rows)
            ]
        )


async def _show_tokens(api: Api, file: dict[str, Any]) -> None:
    models = [model["id"] for model in await api.list_all("/v1/models") if _is_ready(model)]
    methods = [method["name"] for method in (await api.get(_METHODS))["data"]]
    with panel("Tokens"):
        if models:
            # The usual one first.
            TokenView(
                api, file["id"], models=models, methods=sorted(methods, key=lambda m: m != "supervised")
            )
        else:
            empty(
                "No model to read it",
                "Import a base model to see the tokens that it makes of each row.",
                links={"Models": "/models"},
            )


def _is_ready(model: dict[str, Any]) -> bool:
    return model.get("status") == "ready"
