"""Ends an engine whose own device never finishes a step.

Waiting for a device cannot be given a time limit, and the thread that waits cannot be interrupted;
so another thread looks at the clock. (Collectives have time limits of their own, and so has the
wait for the results of other ranks.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from moe_engine.engine.control import ControlHub
from moe_engine.types.messages import RankFailed

_LOOK_INTERVAL = 1.0


class StepWatch:
    """Fails the engine when one wait takes longer than ``timeout`` seconds."""

    def __init__(self, hub: ControlHub, timeout: float) -> None:
        self._hub = hub
        self._timeout = timeout
        self._waiting: tuple[int, float] | None = None
        threading.Thread(target=self._look, name="step-watch", daemon=True).start()

    @contextmanager
    def waiting_for(self, step_id: int) -> Iterator[None]:
        """Watch over what is done inside."""
        self._waiting = (step_id, time.monotonic())
        try:
            yield
        finally:
            self._waiting = None

    def _look(self) -> None:
        while True:
            time.sleep(min(_LOOK_INTERVAL, self._timeout / 2))
            waiting = self._waiting
            if waiting is not None and time.monotonic() - waiting[1] > self._timeout:
                self._hub.fail(
                    RankFailed(
                        0,
                        f"step {waiting[0]} did not finish on rank 0's device within "
                        f"{self._timeout:g} s (step_timeout)",
                        secondary=True,
                    )
                )
