"""Ranks of an exchange in one process on one GPU, each with a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_engine.dist.exchange.base import Received
from moe_engine.dist.exchange.domain import ExchangeShape, NvlinkDomain, virtual_domains
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.dist.exchange.replicas import Balancing
from moe_engine.ops.moe import ExpertOutputs, MoEOutput, summed
from moe_engine.ops.reference.exchange import Tokens
from tests.kernels.exchange_work import (
    Experts,
    assert_received,
    expected_outputs,
    scaling_experts,
    tokens_of_ranks,
)

Finish = Callable[[int, MoEOutput], Any]
"""What a rank takes from its combine."""


def rows_alone(rank: int, combined: MoEOutput) -> torch.Tensor:
    """A `Finish` without a norm behind it."""
    return summed(combined)


def make_room(shape: ExchangeShape, streams: Sequence[torch.cuda.Stream]) -> None:
    """Memory for each stream before any kernel waits: taking more may wait for that kernel."""
    most = shape.num_ranks * shape.max_tokens * shape.top_k * shape.row_bytes
    for stream in streams:
        with torch.cuda.stream(stream):
            sizes = (most, most, most, most // 8, *[1 << 20] * 6)
            kept = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
            del kept
    torch.cuda.synchronize()


class VirtualRanks:
    """All ranks of an exchange of a shape."""

    def __init__(self, shape: ExchangeShape, timeout: float = 5.0) -> None:
        device = torch.device("cuda", 0)
        self.shape = shape
        self.domains: list[NvlinkDomain] = virtual_domains(shape, device, timeout)
        self.streams = [torch.cuda.Stream(device) for _ in self.domains]
        make_room(shape, self.streams)

    def exchange(
        self,
        ranks: Sequence[Tokens],
        step_tokens: int,
        experts: Sequence[Experts],
        balancing: Sequence[Balancing] | None = None,
        finish: Finish = rows_alone,
    ) -> tuple[list[Received], list[Any]]:
        """Dispatch, experts, combine; what each rank received and got back, not waited for.

        Enqueued one kind after the other, so that no rank's kernel is behind one that waits for it.
        """
        exchanges = [NvlinkExchange(domain, step_tokens) for domain in self.domains]
        received, made, outputs = [], [], []
        of_ranks = balancing or [None] * len(ranks)
        for exchange, stream, tokens, of_rank in zip(
            exchanges, self.streams, ranks, of_ranks, strict=True
        ):
            with torch.cuda.stream(stream):
                sent = (tokens.x_TH, tokens.ids_TK, tokens.weights_TK, of_rank)
                received.append(exchange.dispatch(*sent))
        for stream, arrived, work in zip(self.streams, received, experts, strict=True):
            with torch.cuda.stream(stream):
                made.append(ExpertOutputs(work(arrived), arrived.slot_ids_RK, arrived.weights_RK))
        for rank, (exchange, stream, y, arrived) in enumerate(
            zip(exchanges, self.streams, made, received, strict=True)
        ):
            with torch.cuda.stream(stream):
                outputs.append(finish(rank, exchange.combine(y, arrived)))
        return received, outputs

    def capture(
        self,
        ranks: Sequence[Tokens],
        step_tokens: int,
        experts: Sequence[Experts],
        finish: Finish = rows_alone,
    ) -> tuple[list[torch.cuda.CUDAGraph], list[Any]]:
        """A graph for each rank of its part of `exchange`, and the outputs that it writes."""
        graphs, outputs = [], []
        for rank, domain in enumerate(self.domains):
            exchange, tokens = NvlinkExchange(domain, step_tokens), ranks[rank]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.streams[rank]):
                arrived = exchange.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK)
                y = ExpertOutputs(experts[rank](arrived), arrived.slot_ids_RK, arrived.weights_RK)
                outputs.append(finish(rank, exchange.combine(y, arrived)))
            graphs.append(graph)
        return graphs, outputs

    def replay(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        """All ranks' graphs side by side, not waited for."""
        for graph, stream in zip(graphs, self.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()

    def finish(self) -> None:
        """Wait for all ranks; raises `ExchangeTimeout` if an exchange was given up."""
        torch.cuda.synchronize()
        for domain in self.domains:
            domain.check()


def random_ranks(shape: ExchangeShape, routing: str, step_tokens: int) -> list[Tokens]:
    """One rank brings all that it may, one nothing, the others anything."""
    counts = [step_tokens, 0, *torch.randint(0, step_tokens + 1, (shape.num_ranks,)).tolist()]
    return tokens_of_ranks(shape, routing, counts[: shape.num_ranks])


def check(world: VirtualRanks, ranks: list[Tokens], step_tokens: int) -> None:
    """Exchange once; everything has the bits of the reference."""
    shape = world.shape
    factors_E = torch.randn(shape.num_experts, device="cuda")
    experts = [scaling_experts(shape, rank, factors_E) for rank in range(shape.num_ranks)]
    torch.cuda.synchronize()
    received, outputs = world.exchange(ranks, step_tokens, experts)
    world.finish()
    arrivals, expected = expected_outputs(shape, ranks, step_tokens, experts)
    for found, right in zip(received, arrivals, strict=True):
        assert_received(found, right)
    for found, right in zip(outputs, expected, strict=True):
        assert torch.equal(found, right), (found - right).abs().max()
