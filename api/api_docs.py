"""/docs: the description of the API in a browser, with scripts out of a wheel instead of a CDN."""

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)
ASSETS_PATH = "/docs/assets"
# Of the wheel only the files: routes made anew around each app stay in a cache, and every app with them.
assets = StaticFiles(packages=[("fastapi_offline", "static")])


@router.get("/docs")
def show_docs(request: Request) -> HTMLResponse:
    """The page."""
    root = request.scope.get("root_path", "")
    return get_swagger_ui_html(
        openapi_url=f"{root}{request.app.openapi_url}",
        title=f"{request.app.title} API",
        swagger_js_url=f"{root}{ASSETS_PATH}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{ASSETS_PATH}/swagger-ui.css",
        swagger_favicon_url=f"{root}{ASSETS_PATH}/favicon.png",
    )
