"""Timing GPU work by replaying CUDA graphs, and the ceilings of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

COPY_BYTES = 2 << 30
MATMUL_SIZE = 8192
REPLAYS = 7


def time_graph(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds that one of ``calls`` takes, from a graph of all of them; a median.

    Calls that follow each other should read different memory, more of it than the L2 cache holds,
    if that is how the work is met in earnest.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _median_ms(graph.replay) * 1e3 / len(calls)


def measure_gpu_ceilings() -> dict[str, float]:
    """Device copy in TB/s, reads and writes counted, and a bf16 matrix product in TFLOP/s."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    product = torch.empty_like(a)
    copy_ms = _median_ms(lambda: target.copy_(source))
    matmul_ms = _median_ms(lambda: torch.mm(a, b, out=product))
    return {
        "copy_tb_per_s": 2 * COPY_BYTES / copy_ms / 1e9,
        "matmul_tflops": 2 * MATMUL_SIZE**3 / matmul_ms / 1e9,
    }


def describe_gpu() -> dict[str, Any]:
    """The GPU and the versions of what ran on it."""
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "num_multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _median_ms(function: Callable[[], object]) -> float:
    """Milliseconds of device time, the median after two calls to warm up."""
    for _ in range(2):
        function()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
