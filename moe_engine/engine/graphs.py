"""CUDA graphs of steps, one for each of some sizes.

Replaying a graph costs the host microseconds where launching a step's kernels one by one would
cost it more than the device needs to run them. A step is padded to the next size captured.
A decode step's graph ends with the logits. Choosing tokens from them is a graph of its own,
replayed behind it, one for each way to choose (`engine.decode.Choice`), of which a batch needs at
most one. The graph of a step that also computes prompts ends with the hidden states.

All graphs share one memory pool: only one runs at a time, and what a step leaves behind (logits or
hidden states) is used up before the next step starts, by the order of the stream. Only the graphs
that choose run while a step's logits are needed, so they are captured while these are held.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from moe_engine.dist.exchange import ExchangeSelector
from moe_engine.engine.batch import StepBatch
from moe_engine.engine.decode import Choice, DecodeStep
from moe_engine.engine.mixed import MixedSize, MixedStep

_BUCKET_STEPS = ((8, 64), (16, 128), (32, 256), (64, 512), (128, None))
"""(distance, largest size) of the batch sizes from 8 on."""


def graph_buckets(max_rows: int) -> list[int]:
    """Batch sizes to capture, ascending, the last one being ``max_rows``.

    Beyond 32 rows, padding adds less than a quarter.

    Example: ``graph_buckets(100) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]``.
    """
    sizes = [1, 2, 4, 8]
    for distance, largest in _BUCKET_STEPS:
        largest = max_rows if largest is None else largest
        sizes += range(sizes[-1] + distance, largest + 1, distance)
    return [size for size in sizes if size < max_rows] + [max_rows]


def pick_bucket(num_rows: int, buckets: list[int]) -> int | None:
    """The smallest of the ascending ``buckets`` that holds ``num_rows`` rows, None if none does."""
    index = bisect_left(buckets, num_rows)
    return buckets[index] if index < len(buckets) else None


def capturable_buckets(max_rows: int, exchange: ExchangeSelector) -> list[int]:
    """The sizes of `graph_buckets` whose exchange backend can be captured."""
    return [size for size in graph_buckets(max_rows) if exchange.select(size).is_capturable]


class DecodeGraphs:
    """The captured decode steps of one rank.

    Which sizes exist follows from the configuration alone, so every rank replays the same graph
    for the same plan.

    Args:
        sizes: batch sizes, ascending; None: `capturable_buckets`.

    Attributes:
        buckets: the batch sizes, ascending.
    """

    def __init__(
        self, decode: DecodeStep, exchange: ExchangeSelector, sizes: list[int] | None = None
    ) -> None:
        self.buckets = sizes or capturable_buckets(decode.max_rows, exchange)
        self._decode = decode
        self._exchange = exchange
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor | None]] = {}
        self._choice_graphs: dict[tuple[int, Choice], torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def capture(self, pool: Any) -> None:
        """Capture all sizes, the largest first, whose memory the smaller ones reuse.

        A collective over the world. Each size is warmed up beforehand, so that everything that
        happens only once (compiling kernels, loading them, connecting ranks) has happened. That is
        for all sizes, one after another: a capture frees memory that the next one would take anew.

        Args:
            pool: of `torch.cuda.graph_pool_handle`.
        """
        self._decode.load([], [])
        for size in reversed(self.buckets):
            self._decode.warm_up(size, self._exchange.select(size))
        for size in reversed(self.buckets):
            self._capture(size, pool)

    def _capture(self, size: int, pool: Any) -> None:
        """Capture the graphs of one size."""
        exchange = self._exchange.select(size)
        graph, logits = _captured(partial(self._decode.compute, size, exchange), pool)
        for choice in self._decode.choices:
            # The logits are still held, so none of this graph's memory will lie over them.
            self._choice_graphs[size, choice], _ = _captured(
                partial(self._decode.choose, size, logits, choice), pool
            )
        self._graphs[size] = graph, None if logits is None else _unowned(logits)

    def pick(self, num_rows: int) -> int | None:
        """The size for a batch, None if it must run without a graph."""
        return pick_bucket(num_rows, self.buckets)

    def replay(self, size: int) -> torch.Tensor | None:
        """Run the batch that was loaded.

        Returns:
            What `DecodeStep.compute` returns, in memory that the next `replay` overwrites.
        """
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def choose(self, size: int, choice: Choice) -> None:
        """Choose tokens for the batch that was just replayed, as `DecodeStep.choose` does."""
        self._choice_graphs[size, choice].replay()


class MixedGraphs:
    """The captured steps of any kind of one rank, of all sizes of ``mixed``.

    Which these are follows from the configuration alone, as with `DecodeGraphs`.
    """

    def __init__(self, mixed: MixedStep, exchange: ExchangeSelector) -> None:
        self._mixed = mixed
        self._exchange = exchange
        self._graphs: dict[MixedSize, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    @torch.inference_mode()
    def capture(self, pool: Any) -> None:
        """As `DecodeGraphs.capture`; padding alone is computed."""
        self._mixed.warm_up(self._exchange)
        for size in reversed(self._mixed.sizes):
            exchange = self._exchange.select(size.num_rows)
            graph, x_TH = _captured(partial(self._mixed.compute, size, exchange), pool)
            self._graphs[size] = graph, _unowned(x_TH)

    def pick(self, num_tokens: int, num_decodes: int) -> MixedSize | None:
        """The size for a step, None if it must run without a graph."""
        return self._mixed.pick(num_tokens, num_decodes)

    def run(self, size: MixedSize, batch: StepBatch) -> torch.Tensor:
        """Run a step of this size at most.

        Returns:
            Its final hidden states, then padding, in memory that the next `run` overwrites.
        """
        self._mixed.load(batch)
        graph, x_TH = self._graphs[size]
        graph.replay()
        return x_TH


Result = TypeVar("Result")


def _captured(compute: Callable[[], Result], pool: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of what ``compute`` launches, on the device, and what it returns."""
    graph = torch.cuda.CUDAGraph()
    # Torch's own stream for captures stands in for the default stream, which cannot be captured.
    current = torch.cuda.current_stream()
    stream = None if current == torch.cuda.default_stream() else current
    # Other threads (NCCL's watchdog, senders of results) may use the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = compute()
    graph.replay()  # the first replay brings the graph to the device
    return graph, result


class _Memory:
    """Device memory that belongs to somebody else (see `_unowned`)."""

    def __init__(self, interface: dict[str, object]) -> None:
        self.__cuda_array_interface__ = interface


def _unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without a claim on it.

    The pool, which lives as long as the graphs, can then give it to the graphs captured next;
    if each graph held on to its logits, they would add up to half a gigabyte.
    """
    as_bytes = tensor.view(torch.uint8)
    memory = _Memory(as_bytes.__cuda_array_interface__)
    return torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
