"""What pages are made of: panels, status pills, facts, notices, empty states, skeletons."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from nicegui import ui

_PILLS = {
    "running": "live", "importing": "live", "loading": "live", "starting": "live", "pending": "live",
    "validating_files": "live", "uploaded": "live",
    "succeeded": "good", "ready": "good", "processed": "good", "active": "good", "completed": "good",
    "free": "good",
    "failed": "bad", "error": "bad", "quarantined": "bad", "revoked": "bad",
    "paused": "warn", "draining": "warn", "leased": "live",
}  # fmt: skip
_WORDS = {"validating_files": "checking files"}


def pill_of(status: str) -> dict[str, str]:
    """A status as a cell of a table: its words and its colour."""
    return {"pill": _PILLS.get(status, "idle"), "text": _WORDS.get(status, status.replace("_", " "))}


class Pill(ui.label):
    """A status, which `set_status` changes in place."""

    def __init__(self, status: str) -> None:
        super().__init__()
        self._kind = "idle"
        self.classes("pill idle")
        self.set_status(status)

    def set_status(self, status: str) -> None:
        """Show another status."""
        found = pill_of(status)
        self.set_text(found["text"])
        self.classes(add=found["pill"], remove=self._kind)
        self._kind = found["pill"]


def panel(title: str = "", *, flush: bool = False) -> "Panel":
    """A framed block; `flush` lets tables and logs reach its edges."""
    return Panel(title, flush=flush)


class Panel:
    """A framed block: `with panel("Nodes"):` fills it, `with found.actions:` adds buttons to its head."""

    def __init__(self, title: str, *, flush: bool) -> None:
        self.root = ui.element("section").classes("panel")
        with self.root:
            if title:
                with ui.element("div").classes("panel-head"):
                    self.title = ui.html(_escape(title), sanitize=False, tag="h2")
                    self.actions = ui.element("div").classes("actions")
            self.body = ui.element("div").classes("panel-body")
            if flush:
                self.body.classes("flush")

    def __enter__(self) -> "Panel":
        self.body.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.body.__exit__(*problem)


def grid(*, least_px: int = 320) -> ui.element:
    """Blocks side by side, as many as have `least_px` each."""
    return ui.element("div").classes("grid").style(f"--least: {least_px}px")


def row() -> ui.element:
    """Small things in a line that may wrap."""
    return ui.element("div").classes("row-of")


def stack() -> ui.element:
    """Small things below each other."""
    return ui.element("div").classes("stack")


class Facts:
    """Names and values; `show` changes the values in place and adds names that are new."""

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self._list = ui.element("dl").classes("facts")
        self._labels: dict[str, ui.label] = {}
        self.show(values or {})

    def show(self, values: Mapping[str, str]) -> None:
        """Show these values; names that are not among them keep theirs."""
        for name, value in values.items():
            if name not in self._labels:
                with self._list:
                    with ui.element("dt"):
                        ui.label(name)
                    with ui.element("dd"):
                        self._labels[name] = ui.label()
            self._labels[name].set_text(value)


def link(text: str, target: str) -> ui.link:
    """A link to another page of the dashboard."""
    return ui.link(text, target)


def go_button(text: str, target: str, *, main: bool = False) -> ui.button:
    """A link that looks like a button."""
    return ui.button(text).props(f'href="{target}" tag=a {"" if main else "outline"}')


def empty(
    head: str,
    text: str,
    *,
    links: Mapping[str, str] | None = None,
    actions: Mapping[str, Callable[[], Any]] | None = None,
) -> ui.element:
    """What stands where nothing is yet: what it will be, and what to do next."""
    with ui.element("div").classes("empty") as root:
        ui.label(head).classes("head")
        with ui.element("p"):
            ui.label(text)
        if links or actions:
            with ui.element("div").classes("actions"):
                for label, target in (links or {}).items():
                    go_button(label, target)
                for label, act in (actions or {}).items():
                    ui.button(label, on_click=act).props("outline")
    return root


def notice(
    text: str, *, kind: Literal["bad", "warn", "plain"] = "plain", links: Mapping[str, str] | None = None
) -> ui.element:
    """A sentence that must be seen: an error, a warning."""
    role = "alert" if kind == "bad" else "status"
    with ui.element("div").classes(f"notice {kind}").props(f"role={role}") as root:
        ui.label(text).classes("grow")
        for label, target in (links or {}).items():
            link(label, target)
    return root


def skeleton(height_px: int) -> ui.element:
    """Keeps the place of what is still being fetched; as high as that will be."""
    return ui.element("div").classes("skeleton").style(f"height: {height_px}px")


class Bar:
    """A share of a whole as a bar."""

    def __init__(self, share: float = 0.0) -> None:
        with ui.element("div").classes("bar") as self.root:
            self._inner = ui.element("i")
        self.show(share)

    def show(self, share: float) -> None:
        """Show another share, from 0 to 1."""
        self._inner.style(f"width: {100 * min(max(share, 0.0), 1.0):.1f}%")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
