"""`Postbox`: from the client's thread to asyncio queues, waking the event loop once for many items.

A step brings news for every running request. Waking the loop for each costs more than handling it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Postbox:
    """Hands items of other threads to queues of ``loop``, in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._is_called = False

    def put(self, queue: asyncio.Queue[Any], item: Any) -> None:
        """Put ``item`` into ``queue`` soon; from any thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._items.append((queue, item))
        if not self._is_called:
            self._is_called = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._is_called = False
                raise

    def _deliver(self) -> None:
        # First, so that an item put from now on is either seen below or calls again.
        self._is_called = False
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)
