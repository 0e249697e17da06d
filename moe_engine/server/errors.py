"""Every failure as an OpenAI error object: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from moe_engine.errors import EngineDeadError, InvalidRequestError
from moe_engine.server.protocol.base import ErrorObject, ErrorResponse

logger = logging.getLogger(__name__)

_WRONG_TYPE = {"string_type", "list_type", "dict_type"}
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it


class EngineNotReadyError(Exception):
    """The engine is still loading."""


class ClientDisconnected(Exception):
    """The client went away before its answer was complete."""


def error_object(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> ErrorResponse:
    """An error body; OpenAI's ``type`` follows from the HTTP status."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return ErrorResponse(error=ErrorObject(message=message, type=kind, param=param, code=code))


INTERNAL_ERROR = error_object(500, "internal server error", code="internal_error")


def describe(error: BaseException) -> tuple[int, ErrorResponse]:
    """The HTTP status and body for an exception; one that nobody expected is logged, not told."""
    if isinstance(error, InvalidRequestError):
        body = error_object(error.status, error.message, param=error.param, code=error.code)
        return error.status, body
    if isinstance(error, EngineNotReadyError):
        return 503, error_object(503, "the engine is still loading", code="engine_not_ready")
    if isinstance(error, EngineDeadError):
        reason = str(error).partition("\n")[0]  # what follows is a traceback
        return 503, error_object(503, f"the engine is dead: {reason}", code="engine_dead")
    logger.error("unexpected error while serving a request", exc_info=error)
    return 500, INTERNAL_ERROR


def respond(
    status: int, body: ErrorResponse, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The HTTP response that carries an error body."""
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


def describe_validation(errors: Sequence[Any], body: Any) -> tuple[str, str | None]:
    """One message and the offending field for pydantic's list of errors.

    Of a union's errors the one that lies deepest in the request comes closest to the mistake, and
    a wrong value of the right type closer than a wrong type.
    """
    first = max(errors, key=lambda e: (len(e["loc"]), e["type"] not in _WRONG_TYPE))
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first['ctx']['error']}", None
    path = _field_path(first["loc"][1:], body)
    context = first.get("ctx", {})
    path += context.get("where", "")
    if first["type"] == "missing":
        return f"{path or 'the request body'} is required", path or None
    if first["type"] == "extra_forbidden":
        return f"unknown field {path}; this server neither knows nor ignores it", path
    value = context.get("value", first["input"])
    is_constant = value is None or isinstance(value, bool)
    # Any other value can be as large and as deep as the body: only its beginning is shown.
    shown = json.dumps(value) if is_constant else reprlib.repr(value)
    return f"{path or 'the request body'}: {first['msg']} (got {shown})", path or None


def _field_path(loc: Sequence[str | int], body: Any) -> str:
    """``messages[0].content``: the steps of ``loc`` that exist in the body, without union tags."""
    path, value = "", body
    for depth, step in enumerate(loc):
        is_last = depth == len(loc) - 1
        if isinstance(value, list) and isinstance(step, int):
            path += f"[{step}]"
            value = value[step] if step < len(value) else None
        elif isinstance(value, dict) and (step in value or is_last):
            path += f".{step}" if path else str(step)
            value = value.get(step)
    return path[:200]


def install_error_handlers(app: FastAPI) -> None:
    """Make every expected exception and framework refusal an OpenAI error object."""

    async def on_validation_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = describe_validation(error.errors(), error.body)
        return respond(400, error_object(400, message, param=param))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if message == HTTPStatus(error.status_code).phrase:  # the router's own 404 and 405
            message = f"{message}: {request.method} {request.url.path}"
        return respond(error.status_code, error_object(error.status_code, message), error.headers)

    async def on_disconnect(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def on_error(_: Request, error: Exception) -> Response:
        status, body = describe(error)
        return respond(status, body, {"Retry-After": "1"} if status == 503 else None)

    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnected, on_disconnect)
    for kind in (InvalidRequestError, EngineNotReadyError, EngineDeadError):
        app.add_exception_handler(kind, on_error)
