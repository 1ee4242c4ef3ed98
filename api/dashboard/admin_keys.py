"""The keys of an organisation: a table of them, a dialog that makes one and shows it once, and their end."""

import time
from typing import Any

from nicegui import ui
from nicegui.events import GenericEventArguments

from api.dashboard.client import Api, locate
from api.dashboard.elements import Panel, notice, pill_of
from api.dashboard.formats import ago, moment
from api.dashboard.live import Live, act
from api.dashboard.table import Cell, Column, Table, text_cell

_KEYS = "/v1/keys"
_DAY_S = 24 * 3600
_NEVER = "never"
_EXPIRIES = {
    _NEVER: "Never",
    str(_DAY_S): "After a day",
    str(30 * _DAY_S): "After 30 days",
    str(90 * _DAY_S): "After 90 days",
    str(365 * _DAY_S): "After a year",
}
_ROLES = {
    "user": "User: trains, chats, sees the organisation's work",
    "admin": "Admin: all, keys and machines too",
}
_REVOKE = """
<q-td :props="props" class="text-right">
  <q-btn v-if="props.value" outline dense no-caps color="negative" label="Revoke"
    :aria-label="'Revoke ' + props.value.name" @click="$parent.$emit('revoke', props.value)" />
</q-td>
"""
_COLUMNS = [
    Column("name", "Name", wraps=True),
    Column("state", "State"),
    Column("role", "Role", wide=True),
    Column("used", "Last used", "right", wide=True),
    Column("expires", "Expires", "right", wide=True),
    Column("made", "Made", "right", wide=True),
    Column("revoke", "", "right"),
]


class Keys:
    """The table of keys with what is done to them."""

    live: Live

    def __init__(self, api: Api, block: Panel) -> None:
        self._api = api
        with block.actions:
            ui.button("New key", on_click=self._make).props("dense")
        self._table = Table(_COLUMNS)
        self._table.element.add_slot("body-cell-revoke", _REVOKE)
        self._table.element.on("revoke", lambda event: self._confirm(event.args))

    async def fetch(self) -> list[dict[str, Any]]:
        """All keys, newest first."""
        return await self._api.list_all(_KEYS, limit=100)

    def show(self, keys: list[dict[str, Any]]) -> None:
        """Those that open something first."""
        self._table.show([_row_of(key) for key in sorted(keys, key=lambda key: _state_of(key) != "active")])

    async def _make(self) -> None:
        with ui.dialog() as dialog, ui.card():
            ui.label("New key").classes("strong")
            name = ui.input("Name", placeholder="Who or what will use it").classes("full-width")
            name.props("autofocus maxlength=256")
            role = ui.select(_ROLES, value="user", label="Role").classes("full-width")
            expiry = ui.select(_EXPIRIES, value=_NEVER, label="Expires").classes("full-width")
            with ui.element("div").classes("actions"):
                make = ui.button("Make the key", on_click=lambda: dialog.submit(True))
                make.bind_enabled_from(name, "value", lambda text: bool(str(text or "").strip()))
                ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("outline")
        wanted = await dialog
        asked = {"name": str(name.value or "").strip(), "role": role.value}
        if expiry.value != _NEVER:
            asked["expires_in_s"] = int(str(expiry.value))
        dialog.delete()
        if wanted and (made := await act(self._api.post(_KEYS, asked))):
            await self.live.refresh()
            await _show_once(made)

    async def _confirm(self, key: dict[str, str]) -> None:
        with ui.dialog() as dialog, ui.card():
            ui.label(f"Revoke “{key['name']}”?").classes("strong wrap")
            ui.label(
                "From now on it opens nothing, and whoever uses it is refused. This cannot be undone. "
                "If you are logged in with it, you are logged out."
            )
            with ui.element("div").classes("actions"):
                ui.button("Revoke the key", on_click=lambda: dialog.submit(True)).props("color=negative")
                ui.button("Keep it", on_click=lambda: dialog.submit(False)).props("outline")
        wanted = await dialog
        dialog.delete()
        if wanted and await act(self._api.delete(locate("keys", key["id"])), done="The key is revoked."):
            await self.live.refresh()


async def _show_once(made: dict[str, Any]) -> None:
    """The new key, which goes from the page with the dialog; a click beside it does not close it."""
    with ui.dialog().props("persistent") as dialog, ui.card():
        ui.label(f"The key “{made['name']}”").classes("strong wrap")
        notice(
            "Copy it now. It is shown this once and kept nowhere: if it is lost, make another.", kind="warn"
        )
        shown = ui.label(made["key"]).classes("secret mono wrap").props('aria-label="The new key"')
        with ui.element("div").classes("actions"):
            # In the browser alone: writing to the clipboard needs the click itself. Over plain HTTP from
            # another machine browsers offer no clipboard; the key is selected then.
            copy = ui.button("Copy").props("autofocus")
            copy.on("click", _tell_copied, js_handler=_COPY % f"c{shown.id}")
            ui.button("Done", on_click=lambda: dialog.submit(True)).props("outline")
    await dialog
    dialog.delete()


def _tell_copied(event: GenericEventArguments) -> None:
    ui.notify("Copied." if event.args else _SELECTED, type="positive" if event.args else "warning")


_SELECTED = "This browser lets no page copy. The key is selected: press Ctrl+C."
_COPY = """async () => {
  const shown = document.getElementById("%s");
  getSelection().selectAllChildren(shown);
  try { await navigator.clipboard.writeText(shown.textContent.trim()); emit(true); } catch { emit(false); }
}"""


def _row_of(key: dict[str, Any]) -> dict[str, Cell]:
    state = _state_of(key)
    used, expires = key["last_used_at"], key["expires_at"]
    ended = {"revoked": key["revoked_at"], "expired": expires}.get(state)
    return {
        "id": key["id"],
        "name": text_cell(key["name"], note=f"rsd_{key['role']}_{key['id']}_…"),
        "state": pill_of(state) | {"title": moment(ended) if ended else ""},
        "role": key["role"],
        "used": "not yet" if used is None else text_cell(ago(used), title=moment(used)),
        "expires": "never" if expires is None else text_cell(ago(expires), title=moment(expires)),
        "made": text_cell(ago(key["created_at"]), title=moment(key["created_at"])),
        "revoke": {"id": key["id"], "name": key["name"]} if state == "active" else "",
    }


def _state_of(key: dict[str, Any]) -> str:
    if key["revoked_at"] is not None:
        return "revoked"
    if key["expires_at"] is not None and key["expires_at"] <= time.time():
        return "expired"
    return "active"
