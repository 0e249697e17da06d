"""The front end's side of the engine: start the ranks, send requests, hand out updates.

Thread-safe and free of asyncio and torch; `MoEEngine` and `AsyncMoEEngine` are both built on it.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

from moe_engine import env
from moe_engine.config import EngineConfig
from moe_engine.dist.channel import ChannelClosed
from moe_engine.engine.launcher import EXIT_GRACE, RankProcesses
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
        error: why the engine is dead or was not started, or None while it lives.
    """

    info: EngineReady

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._listeners: dict[str, Listener] = {}
        self._ranks: RankProcesses | None = None
        self._thread = threading.Thread(target=self._listen, name="engine-client", daemon=True)
        self._decided = threading.Event()  # whether the start has succeeded
        self._on_death: Callable[[EngineDeadError], None] = lambda _: None
        self._on_progress: Callable[[LoadProgress], None] = lambda _: None
        self.stats = EngineStats()
        self.error: MoEEngineError | None = None

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
        with self._lock:
            if self.error is not None:
                raise self.error
            ranks = RankProcesses(self._config, environment if environment.launched else None)
            self._ranks = ranks
        # A script may end without a word; ranks that are killed then would be reported as dead.
        atexit.register(self.shutdown)
        self._thread.start()
        try:
            if not self._decided.wait(self._config.startup_timeout):
                timeout = f"{self._config.startup_timeout:g} s (startup_timeout)"
                self._end(EngineDeadError(f"the ranks were not ready within {timeout}"))
            if self.error is not None:
                raise self.error
        except BaseException:  # an interrupt too must leave no process behind
            self._end(EngineDeadError("the start was interrupted"))
            atexit.unregister(self.shutdown)
            ranks.kill()
            raise
        return self.info

    def submit(
        self, request_id: str, token_ids: list[int], params: SamplingParams, listener: Listener
    ) -> None:
        """Send one sequence to the engine; ``params.n`` must be 1.

        Raises:
            EngineDeadError: the engine is dead or was shut down.
            InvalidRequestError: ``request_id`` belongs to an open request.
        """
        assert params.n == 1
        with self._lock:
            if self.error is not None:
                raise self.error
            if request_id in self._listeners:
                raise InvalidRequestError(
                    f"request id {request_id!r} belongs to a request that is still open",
                    param="request_id",
                    code="duplicate_request_id",
                )
            self._listeners[request_id] = listener
        self._send(AddRequest(request_id, token_ids, params))

    def abort(self, request_id: str) -> None:
        """Forget a request; its listener hears nothing more. Unknown ids are ignored."""
        with self._lock:
            known = self._listeners.pop(request_id, None) is not None
        if known:
            self._send(AbortRequest(request_id))

    def shutdown(self) -> None:
        """Stop the ranks; open requests get an `EngineDeadError`. Safe to call at any time."""
        was_ready = self._decided.is_set()
        self._end(EngineDeadError("the engine was shut down"))
        with self._lock:
            ranks = self._ranks
        if ranks is None:
            return
        atexit.unregister(self.shutdown)
        self._send(Shutdown())
        ranks.join(EXIT_GRACE if was_ready else 0.0)
        if self._thread.is_alive():
            self._thread.join()

    def _send(self, message: AddRequest | AbortRequest | Shutdown) -> None:
        assert self._ranks is not None
        try:
            self._ranks.channel.send(message)
        except ChannelClosed:
            return  # the listening thread tells every open request why

    def _listen(self) -> None:
        """The client's thread: hand out what rank 0 says until it hangs up."""
        assert self._ranks is not None
        ranks, failure = self._ranks, None
        try:
            while failure is None:
                if not ranks.channel.poll(POLL_INTERVAL):
                    failure = self._unreported_death(ranks)
                    continue
                message = ranks.channel.receive()
                if isinstance(message, RankFailed):
                    failure = message
                else:
                    self._handle(message)
            error = self._explain(failure, ranks)
        except ChannelClosed:
            error = self._explain(None, ranks)
        except Exception as unexpected:
            logger.exception("the engine's client failed")
            error = EngineDeadError(f"the engine's client failed: {unexpected!r}")
        was_ready = self._decided.is_set()
        if self._end(error):
            ranks.kill()
            if was_ready:
                assert isinstance(error, EngineDeadError)
                logger.error("the engine is dead: %s", error)
                self._on_death(error)

    def _unreported_death(self, ranks: RankProcesses) -> RankFailed | None:
        """A rank that ended a while ago although rank 0, which hears all ranks, said nothing.

        It happens to a rank that dies before it has reached rank 0.
        """
        if self.error is not None or ranks.dead_since() < UNREPORTED_DEATH:
            return None
        rank = ranks.first_dead()
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
            self._decided.set()
        else:
            self._on_progress(message)

    def _tell(self, request_id: str, news: RequestUpdate | MoEEngineError, *, last: bool) -> None:
        with self._lock:
            find = self._listeners.pop if last else self._listeners.get
            listener = find(request_id, None)
        if listener is not None:
            _call(listener, news)

    def _explain(self, failure: RankFailed | None, ranks: RankProcesses) -> MoEEngineError:
        """The exception for a failure that rank 0 reported, or for rank 0's own death."""
        if failure is not None and failure.user_error and not self._decided.is_set():
            return USER_ERRORS[failure.user_error](failure.message)
        rank = failure.rank if failure else 0
        message = failure.message if failure else "rank 0 died without a word"
        if not (failure and failure.traceback):
            obituary = ranks.obituary(rank, OBITUARY_WAIT)
            message = f"{message} ({obituary})" if obituary else message
        return EngineDeadError(message, rank=rank, details=failure.traceback if failure else "")

    def _end(self, error: MoEEngineError) -> bool:
        """Fail the start, if it is waiting, and every open request; False if it is over already."""
        with self._lock:
            if self.error is not None:
                return False
            self.error = error
            listeners, self._listeners = list(self._listeners.values()), {}
        self._decided.set()
        for listener in listeners:
            _call(listener, error)
        return True


def _call(listener: Listener, news: RequestUpdate | MoEEngineError) -> None:
    """A listener that fails, say because its event loop is closed, harms nobody else."""
    try:
        listener(news)
    except Exception:
        logger.exception("a request's listener failed")
