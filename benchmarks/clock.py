"""Durations on the host's clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def process_start() -> float:
    """When this process began, on the clock of `time.perf_counter` (Linux: proc(5), field 22)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - (time.clock_gettime(time.CLOCK_BOOTTIME) - began)


def time_call(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
