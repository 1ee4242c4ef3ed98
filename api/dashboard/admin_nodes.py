"""The machines: their devices and who holds them, and the buttons that take one out of service and back."""

from typing import Any

from nicegui import ui

from api.dashboard import job_words as words
from api.dashboard.client import Api, locate
from api.dashboard.elements import Pill, empty, panel, pill_of
from api.dashboard.formats import UNKNOWN, ago, percent, size
from api.dashboard.live import Live, act
from api.dashboard.table import Cell, Column, Table, text_cell

Node = dict[str, Any]
_RELEASE = """
<q-td :props="props" class="text-right">
  <q-btn v-if="props.value" outline dense no-caps label="Release"
    :aria-label="'Release ' + props.value.device" @click="$parent.$emit('release', props.value)" />
</q-td>
"""
_COLUMNS = [
    Column("device", "Device"),
    Column("state", "State"),
    Column("why", "Why", wide=True, wraps=True),
    Column("memory", "Memory", "right"),
    Column("use", "Use", "right", wide=True),
    Column("job", "Job"),
    Column("release", "", "right"),
]


class Nodes:
    """A block a machine, in the order of their names; blocks stay where they are."""

    live: Live

    def __init__(self, api: Api) -> None:
        self._api = api
        with panel("Machines") as none:
            empty(
                "No machine has reported yet",
                "A worker reports its machine when it starts: `residency up` runs one.",
            )
        self._none = none.root
        self._all = ui.element("div").classes("stack blocks")
        self._blocks: dict[str, _Block] = {}

    async def fetch(self) -> list[Node]:
        """All machines by name."""
        return (await self._api.get("/v1/nodes"))["data"]

    def show(self, nodes: list[Node]) -> None:
        """Show them in place."""
        self._none.set_visibility(not nodes)
        self._all.set_visibility(bool(nodes))
        with self._all:
            for node in nodes:
                if node["name"] not in self._blocks:
                    self._blocks[node["name"]] = _Block(self._api, node["name"], self._look_again)
                self._blocks[node["name"]].show(node)
        gone = self._blocks.keys() - {node["name"] for node in nodes}
        for name in gone:
            self._blocks.pop(name).root.delete()

    async def _look_again(self) -> None:
        await self.live.refresh()


class _Block:
    def __init__(self, api: Api, name: str, changed: Any) -> None:
        self._api, self._name, self._changed = api, name, changed
        with panel(f"Machine {name}", flush=True) as block:
            with ui.element("div").classes("row-of padded"):
                self._pill = Pill("active")
                self._about = ui.label().classes("soft small")
            self._table = Table(_COLUMNS)
        with block.actions:
            self._drain = ui.button("Drain", on_click=self._confirm_drain).props("outline dense")
            self._undrain = ui.button("Undrain", on_click=self._end_drain).props("dense")
        self._table.element.add_slot("body-cell-release", _RELEASE)
        self._table.element.on("release", lambda event: self._confirm_release(event.args))
        self.root = block.root

    def show(self, node: Node) -> None:
        """Show another state in the same places."""
        drains = node["state"] == "draining"
        self._pill.set_status(node["state"])
        slots = node["slots"]
        told = [
            "takes no more work" if drains else f"{slots} job{'s' if slots > 1 else ''} at a time",
            f"{size(node['free_bytes'])} of disk free",
            f"seen {ago(node['last_seen_at'])}",
        ]
        self._about.set_text(" · ".join(told))
        self._drain.set_visibility(not drains)
        self._undrain.set_visibility(drains)
        self._table.show([_row_of(device) for device in node["devices"]])

    async def _confirm_drain(self) -> None:
        text = "What runs there saves a checkpoint and waits for another machine. New work waits too."
        if await _ask(f"Drain {self._name}?", text, yes="Drain the machine"):
            await self._post("drain", done="The machine takes no more work.")

    async def _end_drain(self) -> None:
        await self._post("undrain", done="The machine takes work again.")

    async def _confirm_release(self, asked: dict[str, str]) -> None:
        text = f"It is kept from jobs: {asked['why']} Release it once you know that it works."
        if await _ask(f"Release {asked['device']}?", text, yes="Release the device"):
            await self._post("devices", asked["device"], "release", done="Jobs may use the device again.")

    async def _post(self, *path: str, done: str) -> None:
        if await act(self._api.post(locate("nodes", self._name, *path)), done=done):
            await self._changed()


async def _ask(title: str, text: str, *, yes: str) -> bool:
    with ui.dialog() as dialog, ui.card():
        ui.label(title).classes("strong wrap")
        ui.label(text).classes("wrap")
        with ui.element("div").classes("actions"):
            ui.button(yes, on_click=lambda: dialog.submit(True))
            ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("outline")
    wanted = await dialog
    dialog.delete()
    return bool(wanted)


def _row_of(device: dict[str, Any]) -> dict[str, Cell]:
    use = device.get("utilization")
    quarantined = device["state"] == "quarantined"
    why = device["reason"] or ""
    return {
        "id": device["id"],
        "device": text_cell(device["id"], note=device["kind"], title=device["driver"] or ""),
        "state": pill_of(device["state"]) | {"title": why},
        "why": why or UNKNOWN,
        "memory": words.memory_cell(device.get("memory_used_bytes"), device["memory_bytes"]),
        "use": UNKNOWN if use is None else text_cell(percent(use), bar=use),
        "job": words.id_cell(device["held_by"]) if device["held_by"] else UNKNOWN,
        "release": {"device": device["id"], "why": why} if quarantined else "",
    }
