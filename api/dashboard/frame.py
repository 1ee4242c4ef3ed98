"""The frame around every page, and `page`, which puts a function inside it for those who are logged in."""

import html
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import RedirectResponse, Response
from nicegui import Client, app, ui

from api.dashboard import server, theme
from api.dashboard.client import Api, Refused, Trouble
from api.dashboard.elements import empty, notice
from api.dashboard.sessions import sessions
from api.dashboard.theme import icon

_BUILD_WITHIN_S = 30.0


@dataclass(frozen=True)
class Place:
    """An entry of the navigation."""

    path: str
    title: str
    icon: str


PLACES = [
    Place("/", "Overview", "overview"),
    Place("/jobs", "Jobs", "jobs"),
    Place("/new", "New job", "new"),
    Place("/pipelines", "Pipelines", "pipelines"),
    Place("/data", "Data", "data"),
    Place("/models", "Models", "models"),
    Place("/playground", "Playground", "playground"),
    Place("/admin", "Admin", "admin"),
]


class _Page(ui.page):
    def resolve_dark(self) -> bool | None:
        return theme.is_dark()


def page(path: str, *, title: str, within: str | None = None) -> Callable[[Any], Any]:
    """Make `async def build(api, …)` the page at `path`; further parameters are FastAPI's: of path or query.

    Who is not logged in is sent to log in and comes back. `within` is the path of the place in the
    navigation, by default `path`. What `build` raises as `Trouble` is shown in its place.
    """

    def register(build: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        @wraps(build)
        async def framed(request: Request, **asked: Any) -> RedirectResponse | None:
            key = sessions.key_of(request)
            if key is None:
                return RedirectResponse(login_url(request), status_code=303)
            api = server.api(key)
            ui.page_title(f"{title} · Residency")
            with _frame(current=within or path):
                return await _build(build, api, request, asked)

        signature = inspect.signature(build)
        of_page = [parameter for name, parameter in signature.parameters.items() if name != "api"]
        first = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Request)
        of_page = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in of_page]
        framed.__signature__ = inspect.Signature([first, *of_page])  # pyright: ignore[reportAttributeAccessIssue]
        _Page(path, response_timeout=_BUILD_WITHIN_S)(framed)
        return build

    return register


async def _build(
    build: Callable[..., Awaitable[None]], api: Api, request: Request, asked: dict[str, Any]
) -> RedirectResponse | None:
    try:
        await build(api, **asked)
    except Refused as refused:
        if refused.status == 401:
            sessions.close(request)
            return RedirectResponse(login_url(request), status_code=303)
        if refused.status == 404:
            ui.status_code(404)
            empty("This is not here", str(refused), links={"Overview": "/"})
        else:
            notice(str(refused), kind="bad")
    except Trouble as trouble:
        ui.status_code(503)
        notice(str(trouble), kind="bad", links={"Try again": str(request.url.path)})
    return None


def install_error_pages() -> None:
    """What is not there, and what failed, looks like the rest."""

    @app.exception_handler(404)
    async def show_missing(request: Request, _: Exception) -> Response:
        with Client(_Page(""), request=request) as client, _frame(current=""):
            ui.page_title("Not found · Residency")
            empty("There is no such page", "The address may be mistyped.", links={"Overview": "/"})
        return client.build_response(request, 404)

    @app.on_page_exception
    def show_fault() -> None:
        with _frame(current=""):
            notice("The dashboard made a mistake here. Its log tells more.", kind="bad")


def login_url(request: Request) -> str:
    """Where to log in so as to come back to this page."""
    wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return "/login" if wanted == "/" else f"/login?next={quote(wanted, safe='')}"


def head(title: str, *, note: str = "") -> ui.element:
    """The heading of a page. Use the result with `with` for the buttons beside it."""
    with ui.element("header").classes("page-head"):
        with ui.element("div").classes("titles"):
            ui.html(html.escape(title), sanitize=False, tag="h1")
            if note:
                ui.label(note).classes("soft")
        return ui.element("div").classes("actions")


def _frame(*, current: str) -> ui.element:
    ui.html(_topbar(), sanitize=False)
    ui.html(_navigation(current), sanitize=False, tag="nav").classes("nav").props(
        'id=nav popover=auto aria-label="Pages"'
    )
    return ui.element("main").classes("page").props("id=main")


def _topbar() -> str:
    return (
        '<a class="skip" href="#main">Skip to content</a>'
        f'<div class="topbar"><a class="brand" href="/">{icon("brand", size_px=20)}Residency</a>'
        f'<button type="button" popovertarget="nav" aria-label="Menu">{icon("menu", size_px=22)}'
        "</button></div>"
    )


def _navigation(current: str) -> str:
    links = "".join(
        f'<a class="place" href="{place.path}"{" aria-current=page" if place.path == current else ""}>'
        f"{icon(place.icon)}{place.title}</a>"
        for place in PLACES
    )
    choices = "".join(
        f'<button type="button" data-choose="{choice}">{label}</button>'
        for choice, label in (("auto", "Auto"), ("light", "Light"), ("dark", "Dark"))
    )
    return (
        f'<a class="brand" href="/">{icon("brand", size_px=20)}Residency</a>{links}'
        f'<div class="foot"><div class="themes" role="group" aria-label="Colours">{choices}</div>'
        f'<form method="post" action="/logout"><button class="plain-button">{icon("out")}Log out'
        "</button></form></div>"
    )
