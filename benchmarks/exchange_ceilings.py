"""What the exchange between GPUs is held against: NCCL's all-to-all, and the rate of the link.

NCCL moves the same rows as the exchange, in one all-to-all each way, of which every rank knows the
numbers of rows beforehand: to tell them, to pack rows, and to sum what comes back are left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.exchange_cases import EXCHANGES
from benchmarks.exchange_ranks import Rank, RealRanks, capture_calls
from benchmarks.exchange_timing import Interval, times_us
from moe_engine.dist.exchange.domain import ExchangeShape

NCCL_NOTE = "numbers of rows known beforehand; rows packed before, and summed after, not timed"
LINK_BYTES = 1 << 30
LINK_COPIES = 5  # of a measurement, one after the other
LINK_REPETITIONS = 7

Splits = tuple[list[int], list[int]]
"""Rows that a rank sends to each rank, and those that it receives from each."""


def nccl_us(
    world: RealRanks, rank: Rank, shape: ExchangeShape, copies: list[list[list[int]]]
) -> dict[str, float | str]:
    """The all-to-alls' times, and whether they are launched as a graph or eagerly.

    Args:
        copies: for each of the rank's inputs, tokens of each rank that go to each rank, [N, N].
    """
    there = [splits_of(of_input, rank.number) for of_input in copies]
    back = [(received, sent) for sent, received in there]
    result: dict[str, float | str] = {}
    for half, splits, row_bytes in (
        ("dispatch", there, shape.wire_bytes),
        ("combine", back, shape.row_bytes),
    ):
        calls = _calls(world, splits, row_bytes)  # they keep what a graph of them reads and writes
        run, result[f"{half}_launched"] = _runnable(world, rank, calls)
        times = times_us(world, [rank], [run])
        result[f"{half}_us"] = statistics.median(times)
        result[f"{half}_p99_us"] = statistics.quantiles(times, n=100)[98]
    return result


def splits_of(copies: list[list[int]], rank: int) -> Splits:
    """Those of a dispatch.

    Example: of copies ``[[4, 1], [2, 3]]`` rank 0 sends ``[4, 1]`` and receives ``[4, 2]``.
    """
    return copies[rank], [of_rank[rank] for of_rank in copies]


def _calls(world: RealRanks, splits: list[Splits], row_bytes: int) -> list[Callable[[], object]]:
    """`EXCHANGES` all-to-alls of rows that differ from one to the next."""
    sources = [_rows(sum(sent), row_bytes, world.device) for sent, _ in splits]
    most = max(sum(received) for _, received in splits)
    target = _rows(most, row_bytes, world.device)

    def call(number: int) -> None:
        sent, received = splits[number]
        rows = target[: sum(received)]
        dist.all_to_all_single(rows, sources[number], received, sent, group=world.group)

    return [partial(call, number % len(splits)) for number in range(EXCHANGES)]


def _rows(num_rows: int, row_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(num_rows, row_bytes, dtype=torch.uint8, device=device)


def _runnable(
    world: RealRanks, rank: Rank, calls: list[Callable[[], object]]
) -> tuple[Callable[[], object], str]:
    """What launches the calls, after they have run once: a graph if every rank can capture them."""

    def run_all() -> None:
        for call in calls:
            call()

    torch.cuda.synchronize()
    with torch.cuda.stream(rank.stream):
        run_all()
    torch.cuda.synchronize()
    world.meet()
    graph = None
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):  # as before, if capturing fails
            graph = capture_calls(rank.stream, calls)
    except RuntimeError as error:
        print(f"rank {rank.number} cannot capture NCCL's all-to-all: {error}", flush=True)
    if not all(world.all_values([graph is not None])) or graph is None:
        return run_all, "eager"
    return graph.replay, "graph"


def link_bytes_per_s() -> dict[str, float]:
    """Of large copies by the copy engines between the first two GPUs: in one direction alone, and
    in each while both are busy.

    This process makes them all, with nothing else on either GPU.
    """
    directions = [_PeerCopy(0, 1), _PeerCopy(1, 0)]
    rates = {}
    for name, busy in (("one_way", directions[:1]), ("both_ways", directions)):
        _copy(busy)  # warm up
        longest = statistics.median(_copy(busy) for _ in range(LINK_REPETITIONS))
        rates[name] = LINK_BYTES * LINK_COPIES / longest
    return rates


def _copy(busy: list[_PeerCopy]) -> float:
    """Seconds of the slowest direction."""
    intervals = [direction.enqueue() for direction in busy]
    for gpu in (0, 1):
        torch.cuda.synchronize(gpu)
    return max(interval.milliseconds() for interval in intervals) / 1e3


class _PeerCopy:
    """Copies from one GPU to another; streams of its own on both, as copies hold up both."""

    def __init__(self, source: int, target: int) -> None:
        self._from = torch.zeros(LINK_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
        self._to = torch.zeros(LINK_BYTES, dtype=torch.uint8, device=f"cuda:{target}")
        self._source_stream = torch.cuda.Stream(source)
        self._target_stream = torch.cuda.Stream(target)
        for gpu in (source, target):
            torch.cuda.synchronize(gpu)

    def enqueue(self) -> Interval:
        """`LINK_COPIES` of them."""
        interval = Interval()
        with torch.cuda.stream(self._target_stream), torch.cuda.stream(self._source_stream):
            interval.start.record()
            for _ in range(LINK_COPIES):
                self._to.copy_(self._from, non_blocking=True)
            interval.end.record()
        return interval
