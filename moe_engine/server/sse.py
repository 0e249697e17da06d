"""Server-sent events in OpenAI's form: ``data: JSON`` per event, ``data: [DONE]`` at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from json.encoder import encode_basestring

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from moe_engine.server.errors import describe

_PLACEHOLDER = "\0"  # which no name of a model can hold


class EventStreamResponse(StreamingResponse):
    """Streams chunks; an exception becomes an error event after which the stream ends.

    Args:
        chunks: what to send; bytes are whole events.
        close: called once when the response is over, however it ended; must not block.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[BaseModel | bytes], close: Callable[[], None]) -> None:
        super().__init__(_events(chunks), headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # When the client goes away while an event is being sent, the generator is left suspended
        # and its own `finally` would wait for the garbage collector.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class TextEvents:
    """Events of which only the text changes, made without a model for each.

    A chunk with a placeholder for its text is rendered once per choice and cut in two there.

    Args:
        make_chunk: the chunk of a choice, by its index and text.
    """

    def __init__(self, make_chunk: Callable[[int, str], BaseModel]) -> None:
        self._make_chunk = make_chunk
        self._ends: dict[int, tuple[str, str]] = {}

    def render(self, index: int, text: str) -> bytes:
        """The event that ``make_chunk(index, text)`` would give."""
        if index not in self._ends:
            chunk = self._make_chunk(index, _PLACEHOLDER).model_dump_json()
            before, found, after = chunk.partition(encode_basestring(_PLACEHOLDER))
            assert found, "the chunk holds its text"
            self._ends[index] = f"data: {before}", f"{after}\n\n"
        before, after = self._ends[index]
        return f"{before}{encode_basestring(text)}{after}".encode()


async def _events(chunks: AsyncIterator[BaseModel | bytes]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield chunk if isinstance(chunk, bytes) else _event(chunk.model_dump_json())
    except Exception as error:
        yield _event(describe(error)[1].model_dump_json())
        return
    yield _event("[DONE]")


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
