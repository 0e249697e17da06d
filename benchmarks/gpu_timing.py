"""Times of GPU work in CUDA-graph replays, and what the GPU can do at most in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 9
# Data of one replay, at least, so that little of it is still in the L2 cache at the next.
ROTATED_BYTES = 192 << 20
MAX_ROTATIONS = 96
COPY_BYTES = 2 << 30
MATMUL_SIZE = 8192


def num_rotations(bytes_per_call: int) -> int:
    """Calls on data of their own that a graph needs to leave the L2 cache behind."""
    return max(1, min(MAX_ROTATIONS, -(-ROTATED_BYTES // max(1, bytes_per_call))))


def seconds_per_call(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Median over replays of a graph of all calls, divided by their number.

    The calls run one after the other; each should work on data of its own.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    seconds = [_event_seconds(graph.replay) for _ in range(replays)]
    return statistics.median(seconds) / len(calls)


def eager_seconds(call: Callable[[], object], repetitions: int = REPLAYS) -> float:
    """Median of calls that are not captured: with what the host needs to launch them."""
    call()
    return statistics.median(_event_seconds(call) for _ in range(repetitions))


def measure_ceilings() -> dict[str, float]:
    """Bytes/s of a copy (read and written) and FLOP/s of a bfloat16 product of 8192 × 8192."""
    source = torch.ones(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copy_s = eager_seconds(lambda: target.copy_(source))
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16)
    matmul_s = eager_seconds(lambda: torch.mm(a, b))
    return {
        "copy_bytes_per_s": 2 * COPY_BYTES / copy_s,
        "matmul_flop_per_s": 2 * MATMUL_SIZE**3 / matmul_s,
    }


def _event_seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
