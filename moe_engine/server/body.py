"""Request bodies: bounded in size, and JSON to the letter (RFC 8259)."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_engine.server.errors import error_object, respond

# A refused body is read and thrown away up to here, because a connection closed while the client
# is still sending is reset, and a reset can destroy the answer before the client reads it.
MAX_DISCARDED_BYTES = 64 << 20
DISCARD_TIMEOUT_S = 10.0


class BodyLimitMiddleware:
    """Collects a request's body up to ``max_bytes``; a larger one is answered with 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            if "expect" not in headers:  # with Expect, the client has not sent the body yet
                await self._discard(receive)
            await self._refuse(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                body.clear()
                if more:
                    await self._discard(receive)
                await self._refuse(scope, receive, send)
                return
        await self.app(scope, _replay(bytes(body), receive), send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the request body is larger than the limit of {self.max_bytes} bytes"
        response = respond(
            413, error_object(413, message, code="body_too_large"), {"Connection": "close"}
        )
        await response(scope, receive, send)

    @staticmethod
    async def _discard(receive: Receive) -> None:
        async def read() -> None:
            num_bytes, more = 0, True
            while more and num_bytes <= MAX_DISCARDED_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), DISCARD_TIMEOUT_S)
        except TimeoutError:
            return


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives ``body`` in one message and then what the server has to say."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def parse_json(body: bytes) -> Any:
    """Parse a JSON document; raise `HTTPException` 400 for whatever strict JSON forbids.

    Python's parser is too kind for an API: it takes NaN, Infinity and overflowing numbers, other
    encodings than UTF-8, half surrogate pairs, and objects that name a key twice.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_unique_keys,
        )
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_json(f"invalid UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise _bad_json("a \\u escape is half of a surrogate pair") from error
    except RecursionError as error:
        raise _bad_json("nested too deeply") from error
    except ValueError as error:
        raise _bad_json(str(error)) from error
    return value


def _bad_json(reason: str) -> HTTPException:
    return HTTPException(400, f"the body is not valid JSON: {reason}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} does not fit a 64-bit float")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"an object has the key {twice!r:.80} twice")
    return value


class StrictJsonRequest(Request):
    """A request whose JSON is parsed by `parse_json`."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


class StrictJsonRoute(APIRoute):
    """A route that reads its body as strict JSON and asks for the content type to say so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            content_type = request.headers.get("content-type", "")
            media_type = content_type.partition(";")[0].strip().lower()
            if self.body_field is not None and media_type != "application/json":
                raise HTTPException(
                    415, f"Content-Type is {content_type!r:.80}; it must be application/json"
                )
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return handle_strictly
