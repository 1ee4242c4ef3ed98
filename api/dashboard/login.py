"""/login and /logout: plain pages, since nobody is anybody yet."""

import html
import re
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from api.dashboard import server, theme
from api.dashboard.client import Refused, Unreachable
from api.dashboard.sessions import sessions

router = APIRouter()
_MOST_BYTES = 4096
_LOCAL = re.compile(r"/(?![/\\])[^\x00-\x20\\]*")


@router.get("/login")
async def show_login(request: Request, next: str = "/") -> Response:
    """The form; or on to the page, for those who are logged in."""
    if sessions.key_of(request) is not None:
        return RedirectResponse(_local(next), status_code=303)
    return _form(next)


@router.post("/login")
async def log_in(request: Request, next: str = "/") -> Response:
    """Ask the server whether it takes the key; if so, back to the page that was wanted."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            return _form(next, problem="That is longer than a key.", status=413)
    key = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0].strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        return _form(next, problem="Enter a key.", status=400)
    try:
        await server.api(key).get("/v1/models")
    except Refused as refused:
        problem = "The server does not know this key." if refused.status == 401 else str(refused)
        return _form(next, problem=problem, status=401)
    except Unreachable as unreachable:
        return _form(next, problem=str(unreachable), status=503)
    sessions.open(request, key)
    return RedirectResponse(_local(next), status_code=303)


@router.post("/logout")
async def log_out(request: Request) -> Response:
    """Forget the key."""
    sessions.close(request)
    return RedirectResponse("/login", status_code=303)


def _local(target: str) -> str:
    """A path of this dashboard, whatever was asked for."""
    return target if _LOCAL.fullmatch(target) else "/"


def _form(target: str, *, problem: str = "", status: int = 200) -> HTMLResponse:
    told = f'<div class="notice bad" role="alert">{html.escape(problem)}</div>' if problem else ""
    action = html.escape(f"/login?next={quote(_local(target), safe='')}")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Log in · Residency</title><link rel="icon" href="/favicon.ico">{theme.head()}</head>
<body class="login"><main>
<div class="brand">{theme.icon("brand", size_px=22)}Residency</div>
<form method="post" action="{action}">
<label>Key<input name="key" type="password" autocomplete="current-password" required autofocus
 spellcheck="false" placeholder="rsd_…"></label>
{told}<button>Log in</button></form>
<p class="soft small"><code>residency up</code> writes the first key to <code>admin.key</code> in its home,
<code>~/.residency</code>. The key stays in the memory of the dashboard and is sent to
<code>{html.escape(server.url())}</code> alone.</p>
</main></body></html>"""
    return HTMLResponse(page, status_code=status, headers={"cache-control": "no-store"})
