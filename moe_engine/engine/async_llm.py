"""`AsyncMoEEngine`: the engine for asyncio programs; the HTTP server stands on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from moe_engine.config import EngineConfig
from moe_engine.engine.client import EngineClient
from moe_engine.engine.frontend import FrontEnd, News
from moe_engine.errors import EngineDeadError
from moe_engine.text.tokenizer import Tokenizer
from moe_engine.types.messages import EngineReady, EngineStats, LoadProgress
from moe_engine.types.results import RequestOutput
from moe_engine.types.sampling import SamplingParams


class AsyncMoEEngine:
    """Serves many requests at once from one event loop.

    Attributes:
        state: ``starting``, ``ready`` or ``dead``.
        error: why the engine is dead.
        died: set when the engine dies after it was ready.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        self._config = config or EngineConfig()
        self.state: Literal["starting", "ready", "dead"] = "starting"
        self.error: EngineDeadError | None = None
        self.died = asyncio.Event()
        self._front_end: FrontEnd | None = None

    async def start(self, on_progress: Callable[[LoadProgress], None] | None = None) -> None:
        """Start the ranks and wait until they have loaded.

        Raises:
            ConfigError, CheckpointError: the engine cannot be started as asked.
            EngineDeadError: a rank failed while starting.
        """
        loop = asyncio.get_running_loop()

        def on_death(error: EngineDeadError) -> None:
            loop.call_soon_threadsafe(self._die, error)

        def start() -> FrontEnd:
            front_end = FrontEnd(self._config)
            self._front_end = front_end
            front_end.start(on_death, on_progress)
            return front_end

        try:
            await asyncio.to_thread(start)
        except EngineDeadError as error:
            self.state, self.error = "dead", error
            raise
        except BaseException:
            self.state = "dead"
            raise
        self.state = "ready"

    async def shutdown(self) -> None:
        """Stop the ranks; open requests get an `EngineDeadError`."""
        if self._front_end is not None:
            await asyncio.to_thread(self._front_end.client.shutdown)
        self.state = "dead"

    @property
    def info(self) -> EngineReady:
        """The engine's limits, once it is ready."""
        return self._client.info

    @property
    def stats(self) -> EngineStats:
        """The engine's latest counters."""
        return self._client.stats if self._front_end else EngineStats()

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, once the engine is ready."""
        return self._started.tokenizer

    @property
    def default_sampling(self) -> dict[str, Any]:
        """Sampling parameters of the checkpoint's ``generation_config.json``."""
        return self._started.default_sampling

    async def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        """What the model says, piece by piece; closing the iterator aborts the request.

        Args:
            request_id: must not belong to another open request.

        Raises:
            InvalidRequestError: the request cannot be served; before the first output.
            EngineDeadError: the engine is dead.
        """
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[News] = asyncio.Queue()

        def put(item: News) -> None:
            loop.call_soon_threadsafe(news.put_nowait, item)

        request = self._started.open(request_id, prompt_token_ids, params, put)
        try:
            while not request.finished:
                output = request.handle(await news.get())
                if output is not None:
                    yield output
        finally:
            request.abort()

    def _die(self, error: EngineDeadError) -> None:
        self.state, self.error = "dead", error
        self.died.set()

    @property
    def _started(self) -> FrontEnd:
        if self._front_end is None:
            raise EngineDeadError("the engine has not been started")
        return self._front_end

    @property
    def _client(self) -> EngineClient:
        return self._started.client
