"""Overview: what runs, what waits and why, what failed, and the machines."""

from api.dashboard.client import Api
from api.dashboard.elements import empty
from api.dashboard.frame import head, page


@page("/", title="Overview")
async def overview(api: Api) -> None:
    """What runs, what waits, what failed."""
    head("Overview")
    await api.get("/v1/models")
    empty("Nothing here yet", "Soon.")
