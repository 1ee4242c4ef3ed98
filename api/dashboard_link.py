"""/dashboard leads to the dashboard, which is another process and perhaps another host."""

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse

from api.deps import SettingsDep
from api.errors import ApiError

router = APIRouter()


@router.get("/dashboard", include_in_schema=False)
def go_to_dashboard(request: Request, settings: SettingsDep) -> RedirectResponse:
    """Where RESIDENCY_DASHBOARD_URL says. Raises ApiError (404) where it says nothing."""
    target = settings.dashboard_url
    if not target:
        raise ApiError(404, "not_found", "This service was started without a dashboard.")
    if target.startswith(":"):
        target = str(request.url.replace(port=int(target[1:]), path="/", query=""))
    return RedirectResponse(target)
