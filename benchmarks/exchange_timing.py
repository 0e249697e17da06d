"""Times of what the exchange's ranks do side by side: the slowest rank's, of every trial."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks.exchange_cases import EXCHANGES
from benchmarks.exchange_ranks import Rank, Ranks, outputs_of
from moe_engine.dist.exchange.domain import ExchangeShape
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.ops.moe import summed

TRIALS = 200
WARM_UP_TRIALS = 5


class Interval:
    """Two moments of a stream."""

    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds(self) -> float:
        """Between them, once both are past."""
        return self.start.elapsed_time(self.end)


def times_us(world: Ranks, ranks: list[Rank], runs: Sequence[Callable[[], object]]) -> list[float]:
    """Of each trial, the slowest rank's microseconds for one exchange.

    Args:
        runs: for each of this process's ranks, what enqueues `EXCHANGES` exchanges.
    """

    def launch() -> list[Interval]:
        intervals = [Interval() for _ in ranks]
        for rank, run, interval in zip(ranks, runs, intervals, strict=True):
            with torch.cuda.stream(rank.stream):
                interval.start.record()
                run()
                interval.end.record()
        return intervals

    return trials_us(world, ranks, launch, EXCHANGES)


def median_us(world: Ranks, ranks: list[Rank], runs: Sequence[Callable[[], object]]) -> float:
    """Of all trials; see `times_us`."""
    return statistics.median(times_us(world, ranks, runs))


def eager_us(world: Ranks, ranks: list[Rank], shape: ExchangeShape) -> list[float]:
    """The same of exchanges that are launched kernel by kernel."""
    steps = [NvlinkExchange(rank.domain, shape.max_tokens) for rank in ranks]

    def launch() -> list[Interval]:
        intervals = [Interval() for _ in ranks]
        received = []
        for rank, step, interval in zip(ranks, steps, intervals, strict=True):
            tokens = rank.inputs[0]
            with torch.cuda.stream(rank.stream):
                interval.start.record()
                received.append(step.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK))
        for rank, step, arrived in zip(ranks, steps, received, strict=True):
            with torch.cuda.stream(rank.stream):
                summed(step.combine(outputs_of(rank, arrived), arrived))
        for rank, interval in zip(ranks, intervals, strict=True):
            with torch.cuda.stream(rank.stream):
                interval.end.record()
        return intervals

    return trials_us(world, ranks, launch, 1)


def trials_us(
    world: Ranks, ranks: list[Rank], launch: Callable[[], list[Interval]], num_exchanges: int
) -> list[float]:
    """The slowest rank's microseconds for one of the exchanges that ``launch`` enqueues.

    The ranks begin together, when all has been enqueued.
    """
    times_of: list[list[float]] = [[] for _ in ranks]
    for _ in range(WARM_UP_TRIALS + TRIALS):
        world.start_together(ranks)
        intervals = launch()
        torch.cuda.synchronize()
        for rank, interval, times in zip(ranks, intervals, times_of, strict=True):
            rank.domain.check()
            times.append(interval.milliseconds() * 1e3 / num_exchanges)
    return slowest([times[WARM_UP_TRIALS:] for times in world.all_values(times_of)])


def slowest(times_of: Sequence[Sequence[float]]) -> list[float]:
    """Of each trial, the longest time of a rank.

    Example, two ranks and three trials: ``slowest([[1, 5, 2], [3, 4, 2]])`` is ``[3, 5, 2]``.
    """
    return [max(trial) for trial in zip(*times_of, strict=True)]
