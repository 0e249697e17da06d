"""What a measurement ran on: hardware, versions, load, and the ceilings of the same run."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

MATMUL_SIZE = 2048
COPY_BYTES = 256 << 20
CEILING_REPETITIONS = 7


def describe_machine() -> dict[str, Any]:
    """The processor, its memory, and the versions of what computes."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "architecture": platform.machine(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_gib": round(_total_memory() / 2**30, 1),
        "widest_instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def load_average() -> list[float]:
    """Runnable processes over the last 1, 5 and 15 minutes, this benchmark's own included."""
    return [round(load, 2) for load in os.getloadavg()]


def measure_ceilings() -> dict[str, float]:
    """Float32 matrix multiplication in GFLOP/s and memory copy in GB/s, medians.

    A copy counts its reads and its writes.
    """
    a, b = torch.randn(MATMUL_SIZE, MATMUL_SIZE), torch.randn(MATMUL_SIZE, MATMUL_SIZE)
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    matmul_s = median_time(lambda: torch.mm(a, b), CEILING_REPETITIONS)
    copy_s = median_time(lambda: target.copy_(source), CEILING_REPETITIONS)
    return {
        "matmul_gflops": 2 * MATMUL_SIZE**3 / matmul_s / 1e9,
        "copy_gb_per_s": 2 * COPY_BYTES / copy_s / 1e9,
    }


def median_time(function: Callable[[], object], repetitions: int) -> float:
    """Seconds that a call takes, the median after one call to warm up."""
    function()
    return statistics.median(time_call(function) for _ in range(repetitions))


def time_call(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _field(path: str, name: str) -> str:
    """The first ``name : value`` of that name in a file; empty if there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(values, "")
