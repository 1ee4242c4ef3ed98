"""Upload of files: the form that takes them, and the route that hands their bytes on as they come."""

import html
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from nicegui import app, ui
from starlette.requests import ClientDisconnect

from api.dashboard import server, theme
from api.dashboard.client import Refused, Trouble
from api.dashboard.sessions import sessions

PATH = "/data/upload"
# What may be said of the rows, as `PUT /v1/files` takes it.
_OPTIONS = ("format", "column_map", "max_invalid_fraction")


@app.put(PATH)
async def hand_on(request: Request, filename: str) -> JSONResponse:
    """The body as a training file of the server's: never more than a piece of it is here."""
    key = sessions.key_of(request)
    if key is None:
        return JSONResponse({"message": "Log in again."}, status_code=401)
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        return JSONResponse({"message": "The browser does not tell how long the file is."}, status_code=411)
    said = {name: request.query_params.get(name) for name in _OPTIONS}
    try:
        stored = await server.api(key).upload(
            "/v1/files",
            request.stream(),
            size_bytes=int(length),
            filename=filename,
            purpose="fine-tune",
            **said,
        )
    except Refused as refused:
        if refused.status == 401:
            sessions.close(request)
        told = {"message": str(refused), "param": refused.param}
        return JSONResponse(told, status_code=refused.status)
    except Trouble as trouble:
        return JSONResponse({"message": str(trouble)}, status_code=502)
    except ClientDisconnect:  # cancelled; the server keeps nothing of it
        return JSONResponse({"message": "Cancelled."}, status_code=400)
    return JSONResponse({"id": stored["id"]})


def upload_form(methods: list[dict[str, Any]]) -> None:
    """Where files are dropped, with what may be said of their rows."""
    formats = dict.fromkeys(row["name"] for method in methods for row in method["row_formats"])
    options = "".join(f"<option>{html.escape(name)}</option>" for name in formats)
    ui.add_body_html(f'<script src="{theme.url_of("upload.js")}"></script>')
    ui.html(
        '<label class="drop"><input type="file" multiple aria-label="Files to upload">'
        "<span><b>Drop files here</b> or choose them</span>"
        '<span class="soft small">JSONL, JSON, CSV, Parquet or plain text, one example a row</span></label>'
        '<details><summary>The rows use other names or may be wrong</summary><div class="options">'
        '<label>Format<select name="format" aria-label="Format">'
        f'<option value="">Found by itself</option>{options}</select>'
        "</label><label>Columns<input name=column_map aria-label=Columns spellcheck=false autocomplete=off "
        'placeholder=\'{"prompt": "question"}\'></label><label>Rows that may be wrong'
        '<input name="max_invalid_fraction" aria-label="Rows that may be wrong" inputmode="decimal" '
        'autocomplete="off" placeholder="0"></label>'
        '</div><p class="soft small">Columns: our key and the name it has in your file, as a JSON object. '
        "Rows that may be wrong: as a part of all, such as 0.01; they are left out.</p></details><ul></ul>",
        sanitize=False,
        tag="form",
    ).classes("upload").props('onsubmit="return false"')
