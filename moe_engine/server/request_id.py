"""X-Request-Id: taken from the client or made up, returned with every answer, and in the log."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_engine.server.errors import INTERNAL_ERROR, respond

logger = logging.getLogger(__name__)

_USABLE = re.compile(r"[!-~]{1,128}")  # visible ASCII only: it goes into headers and logs


class RequestIdMiddleware:
    """Adds the header ``X-Request-Id`` to every response, the client's own if it sent one.

    An exception that nothing below has handled is logged under that id and answered with 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        offered = Headers(scope=scope).get("x-request-id", "")
        request_id = offered if _USABLE.fullmatch(offered) else uuid.uuid4().hex

        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            has_started = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected error in request %s", request_id)
            if has_started:
                raise
            await respond(500, INTERNAL_ERROR)(scope, receive, send_with_id)
