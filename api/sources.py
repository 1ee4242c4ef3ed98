"""What an import may come from."""

from api.errors import ApiError
from api.settings import ApiSettings
from db.sources import HubSource, parse_hub


def check_hub(source: str, settings: ApiSettings, *, param: str = "source") -> HubSource:
    """The repository that `source`, at `param` of the request, names.

    Raises ApiError where hubs are off, or where it names none.
    """
    try:
        parsed = parse_hub(source)
    except ValueError as error:
        message = f"Invalid value for '{param}': {error}."
        raise ApiError(400, "invalid_value", message, param=param) from error
    if not settings.hub:
        message = "Imports from a hub are switched off here (RESIDENCY_HUB)."
        raise ApiError(400, "hub_disabled", message, param=param)
    return parsed
