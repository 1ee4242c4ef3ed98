"""What routes ask for: the settings, the database, and query parameters that they know."""

import re
from typing import Annotated, Any

from fastapi import Depends, Query, Request

from api.errors import ApiError, hint
from api.settings import ApiSettings
from db.session import Database


def get_settings(request: Request) -> ApiSettings:
    """The settings the app was made with."""
    return request.app.state.settings


def get_database(request: Request) -> Database:
    """The database the app was made with."""
    return request.app.state.database


SettingsDep = Annotated[ApiSettings, Depends(get_settings)]
DatabaseDep = Annotated[Database, Depends(get_database)]
After = Annotated[str | None, Query(description="Id of the last object of the page before.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Objects of a page.")]
METADATA_FILTER = re.compile(r"metadata\[(.{1,64})\]")


async def refuse_unknown_query(request: Request) -> None:
    """Raise ApiError (400) for a query parameter that the route does not know.

    To ignore a filter is to answer another question.
    """
    known = _query_names(request.scope["route"].dependant)
    for name in request.query_params:
        if name in known or ("metadata" in known and METADATA_FILTER.fullmatch(name)):
            continue
        message = f"Unknown parameter: '{name}'.{hint(name, known)}"
        raise ApiError(400, "unknown_parameter", message, param=name)


def _query_names(dependant: Any) -> set[str]:
    names = {field.alias for field in dependant.query_params}
    return names.union(*(_query_names(each) for each in dependant.dependencies))
