"""What the OpenAPI document says about failures and streams."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from moe_engine.server.protocol.base import ErrorResponse


def error_responses(**descriptions: str) -> dict[int | str, dict[str, Any]]:
    """Documentation of error answers: ``error_responses(s404="unknown model")``."""
    return {
        int(name.removeprefix("s")): {"model": ErrorResponse, "description": text}
        for name, text in descriptions.items()
    }


_EVENT_SCHEMA = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk as JSON, or [DONE]."}},
    "required": ["data"],
}
GENERATE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer, or with stream=true its chunks as server-sent events, "
        "the last of which is [DONE], or an object with the key error if the engine fails.",
        "content": {"text/event-stream": {"itemSchema": _EVENT_SCHEMA}},
    },
    **error_responses(
        s400="The request cannot be served as asked; error.param names the field.",
        s404="Unknown model.",
        s413="The body is larger than the server takes.",
        s415="The body's content type is not application/json.",
        s429="Too many requests wait already.",
        s500="A fault of the server.",
        s503="The engine is loading or dead.",
    ),
}


def install_openapi(app: FastAPI) -> None:
    """Serve a document without FastAPI's own 422 answers, which this server never gives."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
