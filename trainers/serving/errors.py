"""OpenAI's error bodies for whatever goes wrong in an engine."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from trainers.serving.generator import GenerationFailed
from trainers.serving.schemas import BadRequest


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _answer_invalid_body)
    app.add_exception_handler(BadRequest, _answer_bad_request)
    app.add_exception_handler(GenerationFailed, _answer_failed)
    app.add_exception_handler(HTTPException, _answer_http_error)


def describe_error(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": param, "code": code}


async def _answer_bad_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BadRequest)
    body = describe_error(str(error), "invalid_request_error", param=error.param, code=error.code)
    return JSONResponse({"error": body}, status_code=error.status)


async def _answer_invalid_body(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # A union reports one error a branch: the deepest that is not about the type is about what was meant.
    first = max(error.errors(), key=lambda item: (not item["type"].endswith("_type"), len(item["loc"])))
    param = _name_parameter(first["loc"])
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return JSONResponse(
        {"error": describe_error(message, "invalid_request_error", param=param, code=code)}, status_code=400
    )


def _name_parameter(location: tuple[int | str, ...]) -> str | None:
    """("body", "messages", 0, "content", "str") -> "messages.0.content": union tags name no parameter."""
    if len(location) > 1 and isinstance(location[1], int):
        return None  # a place in a body that is not JSON
    names = [str(part) for part in location[1:] if isinstance(part, int) or part.replace("_", "").isalpha()]
    while names and (names[-1] in ("str", "int", "float", "bool", "TextPart") or len(names) > 4):
        names.pop()
    return ".".join(names) or None


async def _answer_failed(_request: Request, error: Exception) -> JSONResponse:
    body = describe_error(f"The engine failed: {error}", "server_error", code="engine_failed")
    return JSONResponse({"error": body}, status_code=503)


async def _answer_http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    body = describe_error(str(error.detail), "invalid_request_error", code=code)
    return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)
