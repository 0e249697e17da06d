"""Server-sent events in OpenAI's form: ``data: JSON`` per event, ``data: [DONE]`` at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from moe_engine.server.errors import describe


class EventStreamResponse(StreamingResponse):
    """Streams chunks; an exception becomes an error event after which the stream ends.

    Args:
        chunks: what to send.
        close: called once when the response is over, however it ended; must not block.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[BaseModel], close: Callable[[], None]) -> None:
        super().__init__(_events(chunks), headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # When the client goes away while an event is being sent, the generator is left suspended
        # and its own `finally` would wait for the garbage collector.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _events(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield _event(chunk.model_dump_json())
    except Exception as error:
        yield _event(describe(error)[1].model_dump_json())
        return
    yield _event("[DONE]")


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
