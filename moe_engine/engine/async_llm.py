"""`AsyncMoEEngine`: the engine for asyncio programs; the HTTP server stands on it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from moe_engine.config import EngineConfig
from moe_engine.engine.client import EngineClient
from moe_engine.engine.frontend import FrontEnd, News, Prompt, make_config, merge_news
from moe_engine.engine.postbox import Postbox
from moe_engine.errors import EngineDeadError
from moe_engine.text.tokenizer import Tokenizer
from moe_engine.types.messages import EngineReady, EngineStats, LoadProgress
from moe_engine.types.results import RequestOutput
from moe_engine.types.sampling import SamplingParams


class AsyncMoEEngine:
    """Serves many requests at once from one event loop; the twin of `MoEEngine`.

    Takes the same arguments. Use it as an asynchronous context manager, or await `start` and
    `shutdown`.

    Attributes:
        state: ``starting``, ``ready`` or ``dead``.
        error: why the engine is dead.
        died: set when the engine dies after it was ready.

    Example:
        >>> async with AsyncMoEEngine(attention_tp=2) as engine:
        ...     async for piece in engine.generate("Once upon a time"):
        ...         print(piece.outputs[0].text, end="")
    """

    def __init__(
        self,
        model: str | None = None,
        attention_tp: int = 1,
        attention_dp: int = 1,
        device: str = "auto",
        **options: Any,
    ) -> None:
        self._set_up(make_config(model, attention_tp, attention_dp, device, options))

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """An engine for a configuration that exists already."""
        engine = cls.__new__(cls)
        engine._set_up(config)
        return engine

    def _set_up(self, config: EngineConfig) -> None:
        self._config = config
        self.state: Literal["starting", "ready", "dead"] = "starting"
        self.error: EngineDeadError | None = None
        self.died = asyncio.Event()
        self._front_end: FrontEnd | None = None
        self._request_numbers = itertools.count()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.shutdown()

    async def start(self, on_progress: Callable[[LoadProgress], None] | None = None) -> None:
        """Start the ranks and wait until they have loaded.

        Raises:
            ConfigError, CheckpointError: the engine cannot be started as asked.
            EngineDeadError: a rank failed while starting.
        """
        loop = asyncio.get_running_loop()
        self._postbox = Postbox(loop)

        def on_death(error: EngineDeadError) -> None:
            loop.call_soon_threadsafe(self._die, error)

        def start() -> None:
            front_end = FrontEnd(self._config)
            self._front_end = front_end
            if self.state == "dead":  # shut down while the model was looked up
                raise EngineDeadError("the engine was shut down")
            front_end.start(on_death, on_progress)

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
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """What the model says, piece by piece; closing the iterator aborts the request.

        Args:
            prompt: a text, token ids or chat messages.
            params: None takes what ``generation_config.json`` recommends.
            request_id: must not belong to another open request; None makes one up.

        Raises:
            InvalidRequestError: the request cannot be served; before the first output.
            EngineDeadError: the engine is dead or was not started.
        """
        front_end = self._started
        is_chat = isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping)
        if isinstance(prompt, str) or is_chat:
            token_ids = await asyncio.to_thread(front_end.token_ids, prompt)  # may be long
        else:
            token_ids = front_end.token_ids(prompt)
        params = params or front_end.default_params
        request_id = request_id or f"request-{next(self._request_numbers)}"
        news: asyncio.Queue[News] = asyncio.Queue()

        def put(item: News) -> None:
            self._postbox.put(news, item)

        request = front_end.open(request_id, token_ids, params, put)
        try:
            while not request.finished:
                items = [await news.get()]
                while not news.empty():  # the consumer is behind: fewer, larger outputs
                    items.append(news.get_nowait())
                for item in merge_news(items):
                    output = request.handle(item)
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
