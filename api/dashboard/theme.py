"""How the dashboard looks: its style sheet, its icons, and light or dark from the first paint on."""

import hashlib
from pathlib import Path

from nicegui import app, ui
from nicegui.storage import request_contextvar

ASSETS = Path(__file__).parent / "assets"
_THEME_COOKIE = "residency_theme"
_STROKES = {
    "overview": "M4 13h6V4H4zM14 20h6v-9h-6zM4 20h6v-3H4zM14 7h6V4h-6z",
    "jobs": "M4 6h16M4 12h16M4 18h10",
    "new": "M12 5v14M5 12h14",
    "pipelines": "M6 4v5a3 3 0 0 0 3 3h6a3 3 0 0 1 3 3v5M6 4 3 7M6 4l3 3M18 20l-3-3M18 20l3-3",
    "data": "M4 6c0-3 16-3 16 0s-16 3-16 0v12c0 3 16 3 16 0V6M4 12c0 3 16 3 16 0",
    "models": "M12 3 4 7.5v9L12 21l8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
    "playground": "M4 5h16v11H10l-5 4v-4H4zM8 10h8",
    "admin": "M12 3l7 3v5c0 5-3 8-7 10-4-2-7-5-7-10V6zM9 12l2 2 4-4",
    "menu": "M4 7h16M4 12h16M4 17h16",
    "out": "M14 4H5v16h9M10 12h10M17 9l3 3-3 3",
    "brand": "M12 3v18M3 12h18M7 3h10v4h4v10h-4v4H7v-4H3V7h4z",
}


def icon(name: str, *, size_px: int = 18) -> str:
    """An icon as an SVG text, in the colour of the text around it."""
    return (
        f'<svg width="{size_px}" height="{size_px}" viewBox="0 0 24 24" fill="none" stroke="currentColor" '
        f'stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">'
        f'<path d="{_STROKES[name]}"/></svg>'
    )


FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><rect width="24" height="24" rx="5" '
    'fill="#0b6e69"/><path d="M12 6v12M6 12h12" stroke="#fff" stroke-width="3" stroke-linecap="round"/></svg>'
)


def install() -> None:
    """Serve the style sheet and set what all pages share."""
    app.add_static_files("/assets", ASSETS, max_cache_age=31536000)
    ui.button.default_props("unelevated no-caps")
    ui.input.default_props("outlined dense")
    ui.number.default_props("outlined dense")
    ui.select.default_props("outlined dense options-dense")
    ui.textarea.default_props("outlined dense")
    ui.add_head_html(head(), shared=True)


def head() -> str:
    """What the head of every page begins with."""
    return (
        f'<script src="{url_of("shell.js")}"></script><link rel="stylesheet" href="{url_of("theme.css")}">'
        '<meta name="referrer" content="same-origin">'
    )


def is_dark() -> bool | None:
    """What this browser chose; None leaves it to its system."""
    request = request_contextvar.get()
    choice = request.cookies.get(_THEME_COOKIE) if request else None
    return {"dark": True, "light": False}.get(choice or "")


def url_of(name: str) -> str:
    """The address of an asset."""
    # A name of its own for each content: browsers may keep it for ever.
    digest = hashlib.sha256((ASSETS / name).read_bytes()).hexdigest()[:12]
    return f"/assets/{name}?{digest}"
