"""Times of GPU work in CUDA-graph replays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

REPLAYS = 9
# Data of one replay, at least, so that little of it is still in the L2 cache at the next.
ROTATED_BYTES = 192 << 20
MAX_ROTATIONS = 96


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


def errors_of_fit() -> tuple[type[Exception], ...]:
    """What Triton raises for a kernel that needs more than this GPU has; empty without Triton.

    Any other error is a mistake in the kernel or its call, which no benchmark may leave out.
    """
    try:
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:
        return ()
    return OutOfResources, PTXASError


def in_turns(calls: Sequence[Callable[[], T]], num_turns: int) -> list[list[T]]:
    """What each call returns in each turn, which go forwards and backwards.

    So a clock that drifts, or a card that gets warm, is no call's fault.

    Example: calls a and b in 3 turns run as a b, b a, a b.
    """
    returned: list[list[T]] = [[] for _ in calls]
    for turn in range(num_turns):
        order = range(len(calls))
        for index in reversed(order) if turn % 2 else order:
            returned[index].append(calls[index]())
    return returned


def _event_seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
