"""Compiles a rank's Triton kernels while its weights are filled.

A thread goes through steps in which Triton kernels are compiled instead of run (`engine.sweep`); a
pool of threads compiles them side by side. That pays because most of a compilation holds no Python
lock: LLVM's passes, the assembler, and the C compiler that makes a kernel's launcher.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from moe_engine.log import get_logger

logger = get_logger(__name__)

MAX_THREADS = 16
"""More would wait for Python's lock, which a compilation holds for about a fifth of its time."""


class Precompilation:
    """Compiles in the background what ``steps`` would launch.

    Args:
        steps: launches kernels through `kernels.launch.launch_kernel`.
        is_collective: whether other ranks take part in ``steps``.
        num_threads: threads that compile.
    """

    def __init__(
        self,
        steps: Callable[[], None],
        device: torch.device,
        *,
        is_collective: bool,
        num_threads: int,
    ) -> None:
        self._steps = steps
        self._device = device
        self._is_collective = is_collective
        self._num_threads = num_threads
        self._error: Exception | None = None
        # A daemon, so that a start that fails elsewhere can end the process.
        self._thread = threading.Thread(target=self._run, name="precompile", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all is compiled. A failure costs time only: the first launch compiles again.

        Raises:
            Exception: what a collective ``steps`` raised, since the other ranks may still wait.
        """
        self._thread.join()
        if self._error is None:
            return
        if self._is_collective:
            raise self._error
        logger.warning("kernels are compiled one by one: %r", self._error)

    def _run(self) -> None:
        try:
            self._compile()
        except Exception as error:
            self._error = error

    def _compile(self) -> None:
        from triton import AsyncCompileMode

        from moe_engine.kernels.launch import compile_only

        start = time.perf_counter()
        torch.cuda.set_device(self._device)  # each thread has its own
        with _LoadingPool(
            self._num_threads, initializer=torch.cuda.set_device, initargs=(self._device,)
        ) as pool:
            mode = AsyncCompileMode(pool, ignore_errors=True)
            with mode, compile_only(), torch.inference_mode():
                self._steps()
                stepped = time.perf_counter()
        logger.debug(
            "%d kernels compiled ahead in %.1f s, listed in %.1f s",
            len(mode.raw_futures),
            time.perf_counter() - start,
            stepped - start,
        )


class _LoadingPool(ThreadPoolExecutor):
    """Brings what it has compiled to the device at once, which also makes the kernel's launcher."""

    def submit(self, compile: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        return super().submit(_compile_and_load, compile)


def _compile_and_load(compile: Callable[[], Any]) -> Any:
    kernel = compile()
    # Should it fail, the first launch fails likewise, and says why.
    with suppress(Exception):
        _ = kernel.run
    return kernel


def num_compile_threads(num_local_ranks: int) -> int:
    """A rank's share of the processors that this process may use."""
    num_processors = len(os.sched_getaffinity(0))
    return max(1, min(MAX_THREADS, num_processors // num_local_ranks))
