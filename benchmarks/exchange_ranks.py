"""The ranks of the exchange's benchmark: virtual ones of one process, or a GPU and a process each.

Both kinds run the same code; `VirtualRanks` and `RealRanks` say how ranks start together, and what
is known of ranks of other processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from benchmarks.exchange_cases import EXCHANGES, random_inputs
from moe_engine import env
from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange.base import Received
from moe_engine.dist.exchange.domain import (
    ExchangeShape,
    NvlinkDomain,
    join_domain,
    virtual_domains,
)
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.dist.groups import create_groups
from moe_engine.dist.layout import RankLayout
from moe_engine.dist.rendezvous import open_store
from moe_engine.ops.moe import ExpertOutputs, MoEOutput, summed
from moe_engine.ops.norm import PendingRows, add_rms_norm
from moe_engine.ops.reference.exchange import Tokens

T = TypeVar("T")

# That a trial's launches may take before the first of them runs: for each virtual rank; for a real
# one, which also waits for the other processes to be as far.
VIRTUAL_GATE_CYCLES = 150_000
REAL_GATE_CYCLES = 2_000_000
EXCHANGE_TIMEOUT = 10.0  # seconds
COLLECTIVE_TIMEOUT = 120.0
ALONE_KEY = "bench_exchange/alone"
EPS = 1e-6  # of norms
FLUSH_BYTES = 256 << 20  # several times an L2 cache


@dataclass(frozen=True)
class Rank:
    """What one rank needs to exchange again and again.

    Attributes:
        inputs: tokens for one exchange after the other.
        y_PH: what its experts have made of whatever they received.
        residual_TH, norm_weight_H: of the norm that follows.
    """

    domain: NvlinkDomain
    stream: torch.cuda.Stream
    inputs: list[Tokens]
    y_PH: torch.Tensor
    residual_TH: torch.Tensor
    norm_weight_H: torch.Tensor

    @property
    def number(self) -> int:
        """Among all ranks."""
        return self.domain.shard.rank


class Ranks(Protocol):
    """How the ranks of this process are made, start together, and know of all others.

    Attributes:
        size: ranks of all processes.
    """

    size: int

    def make(self, shape: ExchangeShape, routing: str) -> list[Rank]:
        """This process's ranks, which bring as many tokens as they may (a collective)."""
        ...

    def start_together(self, ranks: list[Rank]) -> None:
        """Whatever is enqueued on the ranks' streams next begins on all of them at a time.

        The L2 cache holds nothing of theirs then.
        """
        ...

    def all_values(self, own: list[T]) -> list[T]:
        """Of each rank, one of whatever this process's ranks have (a collective)."""
        ...

    def all_tensors(self, own: list[torch.Tensor]) -> list[torch.Tensor]:
        """The same of tensors, of one shape and type (a collective)."""
        ...


def _flush_cache() -> None:
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()


class VirtualRanks:
    """All ranks are in this process on one GPU, each in a stream of its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._gate = torch.cuda.Stream()

    def make(self, shape: ExchangeShape, routing: str) -> list[Rank]:
        """See `Ranks.make`."""
        torch.manual_seed(0)
        device = torch.device("cuda", torch.cuda.current_device())
        ranks = [_random_rank(domain, routing, device) for domain in virtual_domains(shape, device)]
        torch.cuda.synchronize()
        return ranks

    def start_together(self, ranks: list[Rank]) -> None:
        """See `Ranks.start_together`."""
        opened = torch.cuda.Event()
        with torch.cuda.stream(self._gate):
            _flush_cache()
            torch.cuda._sleep(VIRTUAL_GATE_CYCLES * len(ranks))
            opened.record()
        for rank in ranks:
            rank.stream.wait_event(opened)

    def all_values(self, own: list[T]) -> list[T]:
        """See `Ranks.all_values`."""
        return own

    def all_tensors(self, own: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `Ranks.all_tensors`."""
        return own


class RealRanks:
    """This process is one rank, with a GPU of its own; torchrun has started them all."""

    def __init__(self, store: dist.Store, ep: Communicator, device: torch.device) -> None:
        self.size, self.number, self.device = ep.size, ep.rank, device
        self._store, self._ep = store, ep

    @classmethod
    def join(cls) -> RealRanks:
        """This rank, as torchrun's environment says (a collective)."""
        place = env.read_environment()
        if place.world_size < 2:
            raise SystemExit("start two or more ranks with torchrun, or let them be --virtual")
        num_gpus = torch.cuda.device_count()
        if place.local_world_size > num_gpus:
            raise SystemExit(f"{place.local_world_size} ranks need a GPU each, not {num_gpus}")
        # NVLink's multicast is for all-reduces, and not every system that offers it can do it.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        env.share_without_multicast()
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        store = open_store(None, place.rank, place.world_size)
        layout = RankLayout(place.rank, place.world_size, 1)
        return cls(store, create_groups(layout, store, device, COLLECTIVE_TIMEOUT).ep, device)

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks, for NCCL."""
        assert self._ep.group is not None
        return self._ep.group

    def meet(self) -> None:
        """Wait until all ranks are here."""
        self._ep.meet()

    def first_alone(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What rank 0 measures, while the others wait with nothing on their GPUs."""
        self.meet()
        if self.number == 0:
            self._store.set(ALONE_KEY, json.dumps(measure()))
        measured: dict[str, float] = json.loads(self._store.get(ALONE_KEY))
        return measured

    def make(self, shape: ExchangeShape, routing: str) -> list[Rank]:
        """See `Ranks.make`."""
        torch.manual_seed(self.number)
        domain = join_domain(shape, self._ep, self.device, EXCHANGE_TIMEOUT)
        rank = _random_rank(domain, routing, self.device)
        torch.cuda.synchronize()
        return [rank]

    def start_together(self, ranks: list[Rank]) -> None:
        """See `Ranks.start_together`.

        What ends on all ranks at a time, within a microsecond or two, is an exchange of one token.
        """
        [rank] = ranks
        tokens = rank.inputs[0]
        one = Tokens(tokens.x_TH[:1], tokens.ids_TK[:1], tokens.weights_TK[:1])
        self.meet()
        with torch.cuda.stream(rank.stream):
            _flush_cache()
            torch.cuda._sleep(REAL_GATE_CYCLES)
            exchange(rank, NvlinkExchange(rank.domain, 1), one)

    def all_values(self, own: list[T]) -> list[T]:
        """See `Ranks.all_values`."""
        [value] = own
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_tensors(self, own: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `Ranks.all_tensors`."""
        [tensor] = own
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(tensors, tensor, group=self.group)
        return tensors

    def leave(self) -> None:
        """When all is measured (a collective)."""
        self.meet()
        dist.destroy_process_group()


def _random_rank(domain: NvlinkDomain, routing: str, device: torch.device) -> Rank:
    shape = domain.shape
    inputs = random_inputs(shape, routing, device)
    num_rows = shape.num_ranks * shape.max_tokens * shape.top_k
    y_PH = torch.empty(num_rows, shape.hidden, dtype=shape.dtype, device=device).normal_()
    residual_TH = torch.randn_like(inputs[0].x_TH)
    norm_weight_H = torch.rand_like(residual_TH[0])
    return Rank(domain, torch.cuda.Stream(device), inputs, y_PH, residual_TH, norm_weight_H)


def exchange(rank: Rank, step: NvlinkExchange, tokens: Tokens) -> torch.Tensor:
    """Dispatch and combine."""
    received = step.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK)
    return summed(step.combine(outputs_of(rank, received), received))


def exchange_norm(
    rank: Rank, step: NvlinkExchange, tokens: Tokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dispatch, combine, and the norm that follows, by packets in one launch with combine."""
    received = step.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK)
    return add_norm(rank, step.combine(outputs_of(rank, received), received))


def exchange_then_norm(
    rank: Rank, step: NvlinkExchange, tokens: Tokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, the norm in a launch of its own."""
    return add_norm(rank, exchange(rank, step, tokens))


def add_norm(rank: Rank, combined: MoEOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm that follows a combine, and the residual stream."""
    if isinstance(combined, PendingRows):
        return combined.add_rms_norm(rank.residual_TH, rank.norm_weight_H, EPS)
    return add_rms_norm(summed(combined), rank.residual_TH, rank.norm_weight_H, EPS)


def dispatch_only(rank: Rank, step: NvlinkExchange, tokens: Tokens) -> None:
    """Dispatch, and the next exchange's number, which else combine sets."""
    step.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK)
    count_only(rank, step, tokens)


def count_only(rank: Rank, step: NvlinkExchange, tokens: Tokens) -> None:
    """What `dispatch_only` does besides, to be left out of its time."""
    rank.domain._counters[:1].add_(1)


def outputs_of(rank: Rank, received: Received) -> ExpertOutputs:
    """The experts' outputs, which take no time here."""
    num_rows = received.slot_ids_RK.numel()
    return ExpertOutputs(rank.y_PH[:num_rows], received.slot_ids_RK, received.weights_RK)


def capture(
    rank: Rank, step_tokens: int, run: Callable[[Rank, NvlinkExchange, Tokens], object]
) -> torch.cuda.CUDAGraph:
    """A graph of one rank's part of `EXCHANGES` exchanges."""
    step = NvlinkExchange(rank.domain, step_tokens)
    inputs = [rank.inputs[number % len(rank.inputs)] for number in range(EXCHANGES)]
    return capture_calls(rank.stream, [partial(run, rank, step, tokens) for tokens in inputs])


def capture_calls(
    stream: torch.cuda.Stream, calls: list[Callable[[], object]]
) -> torch.cuda.CUDAGraph:
    """A graph of what the calls launch, one after the other."""
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog, a thread, may use the device meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for call in calls:
            call()
    return graph
