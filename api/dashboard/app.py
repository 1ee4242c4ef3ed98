"""`residency dashboard`: the pages, served by a process of its own."""

import importlib
import pkgutil
import secrets

from nicegui import app, ui

from api.dashboard import downloads, frame, login, pages, server, theme
from api.dashboard.guard import Guard

_COOKIE = "residency_dashboard"


def run_dashboard(*, api_url: str, host: str, port: int, secure_cookie: bool = False) -> None:
    """Serve the dashboard of the API at `api_url` until SIGINT or SIGTERM.

    Keys live in the memory of this process, so that the secret which signs the names of their sessions
    need not outlive it either.
    """
    server.choose(api_url)
    theme.install()
    app.include_router(login.router)
    app.include_router(downloads.router)
    for module in pkgutil.iter_modules(pages.__path__):
        importlib.import_module(f"{pages.__name__}.{module.name}")
    frame.install_error_pages()
    app.on_shutdown(server.close)
    app.add_middleware(Guard)
    ui.run(
        host=host,
        port=port,
        title="Residency",
        favicon=theme.FAVICON,
        dark=None,
        tailwind=False,
        language="en-US",
        reload=False,
        show=False,
        show_welcome_message=False,
        reconnect_timeout=10.0,
        storage_secret=secrets.token_urlsafe(32),
        session_middleware_kwargs={
            "session_cookie": _COOKIE,
            "same_site": "lax",
            "https_only": secure_cookie,
        },
    )
