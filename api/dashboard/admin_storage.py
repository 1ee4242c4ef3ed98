"""The disk of the service: one bar of what takes it up, and the same in numbers."""

from typing import Any

from nicegui import ui

from api.dashboard.client import Api
from api.dashboard.elements import notice
from api.dashboard.formats import percent, size

_KINDS = {
    "models": "Models",
    "runs": "Runs: checkpoints, adapters, logs",
    "files": "Files",
    "prepared": "Prepared training data",
    "other": "Database, logs and the rest",
}
_ELSE = "Not of this service"
_SCARCE = 0.1  # of the disk


class Storage:
    """Bytes a kind and what is left."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._short = notice("", kind="warn")
        with self._short:
            self._short.clear()
            self._warning = ui.label()
        self._short.set_visibility(False)
        self._free = ui.label().classes("strong number")
        self._parts: dict[str, ui.element] = {}
        self._sizes: dict[str, ui.label] = {}
        with ui.element("div").classes("meter").props("role=img") as self._meter:
            for number, kind in enumerate([*_KINDS, "else"], start=1):
                self._parts[kind] = ui.element("i").classes(f"s{number}")
        with ui.element("dl").classes("legend"):
            for number, (kind, label) in enumerate((_KINDS | {"else": _ELSE}).items(), start=1):
                with ui.element("dt"):
                    ui.element("i").classes(f"s{number}")
                    ui.label(label)
                with ui.element("dd"):
                    self._sizes[kind] = ui.label().classes("number")

    async def fetch(self) -> dict[str, Any]:
        """The newest measurement."""
        return await self._api.get("/v1/storage")

    def show(self, found: dict[str, Any]) -> None:
        """Show it in place."""
        total, free = found["total_bytes"], found["free_bytes"]
        sizes = {kind: found[f"{kind}_bytes"] for kind in _KINDS}
        ours = sum(sizes.values())
        sizes["else"] = max(total - free - ours, 0)
        self._free.set_text(f"{size(free)} free of {size(total)} ({percent(free / total)})")
        self._meter.props(f'aria-label="{size(ours)} of this service, {size(free)} free of {size(total)}"')
        for kind, taken in sizes.items():
            self._parts[kind].style(f"width: {100 * taken / total:.3f}%; min-width: {2 if taken else 0}px")
            self._sizes[kind].set_text(size(taken))
        self._short.set_visibility(free < _SCARCE * total)
        self._warning.set_text(
            f"Only {size(free)} are left. Delete models and files that nobody needs, or make the disk larger."
        )
