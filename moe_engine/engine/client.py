"""The front end's side of the engine: start the ranks, send requests, hand out updates.

Thread-safe and free of asyncio and torch; `MoEEngine` and `AsyncMoEEngine` are both built on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from moe_engine import env
from moe_engine.config import EngineConfig
from moe_engine.dist.channel import ChannelClosed
from moe_engine.engine.launcher import RankProcesses
from moe_engine.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    MoEEngineError,
)
from moe_engine.log import get_logger
from moe_engine.types.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    EngineStats,
    LoadProgress,
    RankFailed,
    RequestRefused,
    RequestUpdate,
    Shutdown,
    Updates,
)
from moe_engine.types.sampling import SamplingParams

logger = get_logger(__name__)

Listener = Callable[[RequestUpdate | MoEEngineError], None]
"""Hears the updates of one request, in order, on the client's thread; an error is the last."""

OBITUARY_WAIT = 1.0
"""Seconds to wait for a dead rank's exit status."""

POLL_INTERVAL = 0.25
UNREPORTED_DEATH = 4.0
"""Seconds; rank 0 reports the death of a rank that it knows well within the latter."""

USER_ERRORS: dict[str, type[MoEEngineError]] = {
    "ConfigError": ConfigError,
    "CheckpointError": CheckpointError,
}


class EngineClient:
    """Owns the rank processes and the connection to rank 0.

    Attributes:
        stats: the engine's latest counters.
        error: why the engine is dead, or None while it lives.
    """

    info: EngineReady

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._listeners: dict[str, Listener] = {}
        self._start_error: MoEEngineError | None = None
        self._started = threading.Event()
        self._closing = False
        self._on_death: Callable[[EngineDeadError], None] = lambda _: None
        self._on_progress: Callable[[LoadProgress], None] = lambda _: None
        self.stats = EngineStats()
        self.error: EngineDeadError | None = None

    def start(
        self,
        on_death: Callable[[EngineDeadError], None] | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> EngineReady:
        """Start the ranks and wait until they have loaded.

        Args:
            on_death: called once, on the client's thread, if the engine dies later.
            on_progress: called on the client's thread while weights are read.

        Raises:
            ConfigError, CheckpointError: the engine cannot be started as asked.
            EngineDeadError: a rank failed, or the ranks took longer than ``startup_timeout``.
        """
        self._on_death = on_death or self._on_death
        self._on_progress = on_progress or self._on_progress
        environment = env.read_environment()
        self._ranks = RankProcesses(self._config, environment if environment.launched else None)
        self._thread = threading.Thread(target=self._listen, name="engine-client", daemon=True)
        self._thread.start()
        if not self._started.wait(self._config.startup_timeout):
            self._start_error = EngineDeadError(
                f"the ranks were not ready within {self._config.startup_timeout:g} s "
                "(startup_timeout)"
            )
        if self._start_error is not None:
            self._closing = True
            self._ranks.kill()
            raise self._start_error
        return self.info

    def submit(
        self, request_id: str, token_ids: list[int], params: SamplingParams, listener: Listener
    ) -> None:
        """Send one sequence to the engine; ``params.n`` must be 1.

        Raises:
            EngineDeadError: the engine is dead.
        """
        assert params.n == 1
        with self._lock:
            if self.error is not None:
                raise self.error
            self._listeners[request_id] = listener
        self._send(AddRequest(request_id, token_ids, params))

    def abort(self, request_id: str) -> None:
        """Forget a request; its listener hears nothing more. Unknown ids are ignored."""
        with self._lock:
            known = self._listeners.pop(request_id, None) is not None
        if known:
            self._send(AbortRequest(request_id))

    def shutdown(self) -> None:
        """Stop the ranks; open requests get an `EngineDeadError`. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self._send(Shutdown())
        self._ranks.join()
        self._thread.join()
        self._fail_requests(EngineDeadError("the engine was shut down"))

    def _send(self, message: AddRequest | AbortRequest | Shutdown) -> None:
        try:
            self._ranks.channel.send(message)
        except ChannelClosed:
            return  # the listening thread tells every open request why

    def _listen(self) -> None:
        """The client's thread: hand out what rank 0 says until it hangs up."""
        failure: RankFailed | None = None
        try:
            while failure is None:
                if not self._ranks.channel.poll(POLL_INTERVAL):
                    failure = self._unreported_death()
                    continue
                message = self._ranks.channel.receive()
                if isinstance(message, RankFailed):
                    failure = message
                else:
                    self._handle(message)
        except ChannelClosed:
            pass
        if not self._closing:
            self._die(failure)

    def _unreported_death(self) -> RankFailed | None:
        """A rank that ended a while ago although rank 0, which hears all ranks, said nothing.

        It happens to a rank that dies before it has reached rank 0.
        """
        if self._closing or self._ranks.dead_since() < UNREPORTED_DEATH:
            return None
        rank = self._ranks.first_dead()
        assert rank is not None
        return RankFailed(rank, f"rank {rank} died without a word")

    def _handle(self, message: Updates | RequestRefused | LoadProgress | EngineReady) -> None:
        if isinstance(message, Updates):
            self.stats = message.stats
            for update in message.requests:
                self._tell(update.request_id, update, last=update.finish_reason is not None)
        elif isinstance(message, RequestRefused):
            error = InvalidRequestError(
                message.message, param=message.param, status=message.status, code=message.code
            )
            self._tell(message.request_id, error, last=True)
        elif isinstance(message, EngineReady):
            self.info = message
            self._started.set()
        else:
            self._on_progress(message)

    def _tell(self, request_id: str, news: RequestUpdate | MoEEngineError, *, last: bool) -> None:
        with self._lock:
            find = self._listeners.pop if last else self._listeners.get
            listener = find(request_id, None)
        if listener is not None:
            listener(news)

    def _die(self, failure: RankFailed | None) -> None:
        """Fail everything: the start if it is still waiting, else every open request."""
        error = self._explain(failure)
        self._ranks.kill()
        if not self._started.is_set():
            self._start_error = error
            self._started.set()
            return
        assert isinstance(error, EngineDeadError)
        logger.error("the engine is dead: %s", error)
        with self._lock:
            self.error = error
        self._fail_requests(error)
        self._on_death(error)

    def _explain(self, failure: RankFailed | None) -> MoEEngineError:
        """The exception for a failure that rank 0 reported, or for rank 0's own death."""
        if failure is not None and failure.user_error:
            return USER_ERRORS[failure.user_error](failure.message)
        rank = failure.rank if failure else 0
        message = failure.message if failure else "rank 0 died without a word"
        if not (failure and failure.traceback):
            obituary = self._ranks.obituary(rank, OBITUARY_WAIT)
            message = f"{message} ({obituary})" if obituary else message
        return EngineDeadError(message, rank=rank, details=failure.traceback if failure else "")

    def _fail_requests(self, error: EngineDeadError) -> None:
        with self._lock:
            listeners, self._listeners = list(self._listeners.values()), {}
        for listener in listeners:
            listener(error)
