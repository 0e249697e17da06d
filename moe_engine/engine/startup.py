"""Where the time of a start goes, and what it has really taken."""

from __future__ import annotations

import time

import torch


class StartupClock:
    """Splits the time since ``start`` into phases that follow one another.

    Args:
        start: `time.perf_counter` when the process was asked for. On Linux and macOS the clock is
            the same in all processes of a machine.

    Attributes:
        seconds: phase -> its duration, in order.
    """

    def __init__(self, start: float) -> None:
        self._start = self._last = start
        self.seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """What has passed since the last mark was ``phase``; the same name again adds to it."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def describe_startup(seconds: dict[str, float]) -> str:
    """A line for people, e.g. ``7.3 s: imports 2.1, weights 0.9``."""
    phases = ", ".join(f"{phase} {duration:.1f}" for phase, duration in seconds.items())
    return f"{sum(seconds.values()):.1f} s: {phases}"


def measured_memory(device: torch.device) -> dict[str, int]:
    """Bytes taken on a GPU, to be held against the plan; nothing for a CPU.

    ``torch_allocated`` and ``torch_reserved`` are the caching allocator's; ``device_used`` is all
    that is taken, by whomever.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "torch_allocated": torch.cuda.memory_allocated(device),
        "torch_reserved": torch.cuda.memory_reserved(device),
        "device_used": total - free,
    }
