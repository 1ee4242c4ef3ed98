"""Every refusal and every fault as an error body in OpenAI's shape."""

import errno
import json
import logging
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from db.errors import Conflict, Corrupt, IllegalTransition, NotFound
from trainers.specs import SpecError

logger = logging.getLogger(__name__)

# The official clients retry 408, 409, 429 and all of 5xx unless told not to.
NEVER_RETRY = {"x-should-retry": "false"}
_TYPES = {403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}


class ApiError(HTTPException):
    """A refusal with all that the error body tells.

    A subclass of HTTPException, because FastAPI turns other exceptions into its own while it reads a body.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail=message, headers=headers)
        self.code, self.param = code, param


def error_body(status: int, code: str | None, message: str, *, param: str | None = None) -> dict[str, Any]:
    """The JSON object of an error."""
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    kind = _TYPES.get(status, fallback)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    code: str | None,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer with an error body."""
    # ASCII JSON: a message may quote half a character of a request, which UTF-8 cannot carry.
    body = json.dumps(error_body(status, code, message, param=param))
    return Response(body, status, headers=headers, media_type="application/json")


def model_not_found(model_id: str) -> ApiError:
    """OpenAI's words for a model that is unknown or not the caller's."""
    message = f"The model `{model_id}` does not exist or you do not have access to it."
    return ApiError(404, "model_not_found", message, param="model")


def hint(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name, or nothing."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def install(app: FastAPI) -> None:
    """Answer every exception that a route may raise."""
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(NotFound, _not_found)
    app.add_exception_handler(Conflict, _conflict)
    app.add_exception_handler(SpecError, _impossible_spec)
    app.add_exception_handler(DataError, _unstorable)
    for away in (OperationalError, InterfaceError, PoolTimeout):
        app.add_exception_handler(away, _database_away)
    app.add_exception_handler(IllegalTransition, _overtaken)
    app.add_exception_handler(Corrupt, _corrupt)
    app.add_exception_handler(OSError, _disk_full)


def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 (narrows what the framework hands over)
    status, headers = error.status_code, error.headers
    if isinstance(error, ApiError):
        return error_response(status, error.code, error.detail, param=error.param, headers=headers)
    where = f"{request.method} {request.url.path}"
    if status == 404:
        return error_response(404, "not_found", f"Invalid URL ({where})", headers=headers)
    if status == 405:
        message = f"Not allowed: {where}. Perhaps you meant to use a different HTTP method?"
        return error_response(405, "method_not_supported", message, headers=headers)
    return error_response(status, None, str(error.detail), headers=headers)


def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    problem = error.errors()[0]
    kind = problem["type"]
    code = _CODES.get(kind, "invalid_value")
    if kind == "json_invalid":
        return error_response(400, code, f"The body is not valid JSON: {problem['ctx']['error']}.")
    param = ".".join(str(part) for part in problem["loc"][1:]) or None
    if param is None and kind == "value_error":
        return error_response(400, code, f"Invalid body: {problem['msg'].removeprefix('Value error, ')}.")
    if param is None:
        return error_response(400, code, "The body must be a JSON object (Content-Type: application/json).")
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
    elif kind == "extra_forbidden":
        known = _fields_at(request.scope["route"], problem["loc"][1:-1])
        message = f"Unknown parameter: '{param}'.{hint(str(problem['loc'][-1]), known)}"
    else:
        message = f"Invalid value for '{param}': {problem['msg'].removeprefix('Value error, ')}."
    return error_response(400, code, message, param=param)


def _fields_at(route: Any, path: tuple[int | str, ...]) -> list[str]:
    """The names that the body of `route` knows at `path`."""
    known = _model_in(route.dependant.body_params[0].field_info.annotation)
    for part in path:
        if isinstance(part, str):
            known = _model_in(known.model_fields[part].annotation)
    return list(known.model_fields)


def _model_in(annotation: Any) -> Any:
    """`list[Item] | None` -> Item"""
    while arguments := [each for each in get_args(annotation) if each is not type(None)]:
        annotation = arguments[0]
    return annotation


def _not_found(_request: Request, error: Exception) -> Response:
    assert isinstance(error, NotFound)  # noqa: S101
    if error.kind == "model":
        return _http_exception(_request, model_not_found(error.subject_id))
    return error_response(404, "not_found", f"No such {error.kind}: {error.subject_id}", param="id")


def _conflict(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Conflict)  # noqa: S101
    return error_response(400, error.code, str(error), param=error.param, headers=NEVER_RETRY)


def _impossible_spec(_request: Request, error: Exception) -> Response:
    assert isinstance(error, SpecError)  # noqa: S101
    return error_response(400, error.code, error.message, param=error.param)


def _unstorable(_request: Request, _error: Exception) -> Response:
    message = "A value of the request cannot be stored: it holds a NUL character or is out of range."
    return error_response(400, "invalid_value", message)


def _database_away(_request: Request, error: Exception) -> Response:
    logger.error("the database does not answer: %s", error)
    message = "The database cannot be reached at the moment."
    return error_response(503, "database_unavailable", message, headers={"retry-after": "2"})


def _overtaken(_request: Request, error: Exception) -> Response:
    logger.info("overtaken: %s", error)
    message = "The object changed at this very moment; try again."
    return error_response(503, "overtaken", message, headers={"retry-after": "1"})


def _corrupt(_request: Request, error: Exception) -> Response:
    logger.error("corrupt: %s", error)
    return error_response(500, "content_corrupt", str(error), headers=NEVER_RETRY)


def _disk_full(_request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)  # noqa: S101
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    message = "There is no space left to store the file."
    return error_response(507, "disk_full", message, headers=NEVER_RETRY)
