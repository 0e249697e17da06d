"""Rank 0's switchboard: one thread that hears the front end and every other rank.

It runs beside the main thread, which may be stuck in a collective when a rank has died; so it is
this thread that reports a failure and ends the process.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing import AuthenticationError, connection

from moe_engine.dist.channel import Channel, ChannelClosed, ChannelListener
from moe_engine.log import get_logger
from moe_engine.types.messages import (
    AbortRequest,
    AddRequest,
    RankFailed,
    RankHello,
    RankReady,
    RankStarted,
    Shutdown,
    StepDone,
    ToCore,
    ToFrontEnd,
    ToRank,
    ToRankZero,
)
from moe_engine.types.step import StepResult

logger = get_logger(__name__)

BLAME_WINDOW = 2.0
"""Seconds to wait for the rank that is to blame once another one has lost its peers."""
LISTEN_INTERVAL = 0.1
"""Seconds after which the listening thread looks for newly connected ranks and deadlines."""


class ControlHub:
    """Channels to the front end and the ranks, and what has arrived on them.

    Attributes:
        requests: messages of the front end, in order.
        results: step results of other DP groups, in order per group.
        ready: ranks that have loaded, with their KV block counts.
        started: ranks that can execute plans.
    """

    def __init__(self, front_end: Channel[ToCore]) -> None:
        self._front_end = front_end
        self._ranks: dict[int, Channel[ToRankZero]] = {}
        self._stopping = False
        self._secondary: list[RankFailed] = []
        self._blame_deadline = 0.0
        self._failing = threading.Lock()
        self.requests: queue.SimpleQueue[AddRequest | AbortRequest | Shutdown] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[RankReady] = queue.SimpleQueue()
        self.started: queue.SimpleQueue[RankStarted] = queue.SimpleQueue()

    def hear_front_end(self) -> None:
        """Start the listening thread, with the front end alone."""
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    def accept_ranks(self, listener: ChannelListener, num_ranks: int) -> None:
        """Wait until ranks 1 .. num_ranks - 1 have connected; they are heard from then on.

        A connection that breaks off or cannot authenticate is none of them.
        """
        while len(self._ranks) < num_ranks - 1:
            try:
                channel: Channel[ToRankZero] = listener.accept(ToRankZero)
                hello = channel.receive()
            except (ChannelClosed, AuthenticationError, EOFError, OSError) as error:
                logger.warning("a connection to the control channel broke off: %s", error)
                continue
            assert isinstance(hello, RankHello)
            self._ranks[hello.rank] = channel

    def tell_front_end(self, message: ToFrontEnd) -> None:
        """Send to the front end; a front end that has gone ends this process."""
        try:
            self._front_end.send(message)
        except ChannelClosed:
            os._exit(1)

    def tell_ranks(self, message: ToRank) -> None:
        """Send to every other rank; one that has gone is reported by the listening thread."""
        for channel in list(self._ranks.values()):
            try:
                channel.send(message)
            except ChannelClosed:
                continue

    def stop(self) -> None:
        """From now on, ranks may hang up without being a failure."""
        self._stopping = True
        self.tell_ranks(Shutdown())

    def fail(self, failure: RankFailed) -> None:
        """Report a failure and end this process at once; if secondary, wait for who is to blame."""
        if failure.secondary and failure.rank == 0:
            time.sleep(BLAME_WINDOW)
        with self._failing:
            with suppress(ChannelClosed):
                self._front_end.send(failure)
            os._exit(1)

    def _listen(self) -> None:
        """Hear everybody until the process ends; an error of this thread's own ends it too."""
        try:
            while True:
                self._listen_once()
        except Exception as error:
            self.fail(RankFailed(0, f"rank 0's control thread: {error}", traceback.format_exc()))

    def _listen_once(self) -> None:
        channels = {channel.fileno(): rank for rank, channel in list(self._ranks.items())}
        channels[self._front_end.fileno()] = -1
        for fileno in connection.wait(list(channels), LISTEN_INTERVAL):
            assert isinstance(fileno, int)
            rank = channels[fileno]
            if rank < 0:
                self._hear_front_end()
            else:
                self._hear_rank(rank)
        if self._secondary and time.monotonic() > self._blame_deadline:
            self.fail(self._secondary[0])

    def _hear_front_end(self) -> None:
        try:
            self.requests.put(self._front_end.receive())
        except ChannelClosed:
            logger.error("the front end has gone; stopping")
            os._exit(1)

    def _hear_rank(self, rank: int) -> None:
        try:
            message = self._ranks[rank].receive()
        except ChannelClosed:
            del self._ranks[rank]
            expected = self._stopping or any(rank == told.rank for told in self._secondary)
            if not expected:
                self.fail(RankFailed(rank, f"rank {rank} died without a word"))
            return
        if isinstance(message, StepDone):
            self.results.put(message.result)
        elif isinstance(message, RankReady):
            self.ready.put(message)
        elif isinstance(message, RankStarted):
            self.started.put(message)
        elif isinstance(message, RankFailed):
            if not message.secondary:
                self.fail(message)
            if not self._secondary:
                self._blame_deadline = time.monotonic() + BLAME_WINDOW
            self._secondary.append(message)
