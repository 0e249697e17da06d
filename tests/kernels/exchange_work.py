"""What ranks of an exchange bring, what their experts make of it, and what must come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_engine.dist.exchange.base import Received
from moe_engine.dist.exchange.domain import ExchangeShape, NvlinkDomain
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.ops.moe import ExpertOutputs, summed
from moe_engine.ops.reference import exchange as reference
from moe_engine.ops.reference.exchange import Arrivals, Tokens

Experts = Callable[[Received], torch.Tensor]
"""What the experts of a rank make of each of its choices, [R * K, H]."""
ROUTINGS = ["uniform", "zipf", "one expert", "one rank", "nothing"]


def shape_of(num_ranks: int, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> ExchangeShape:
    return ExchangeShape(
        **{
            "num_ranks": num_ranks,
            "num_experts": 48 // num_ranks * num_ranks,
            "top_k": 8,
            "hidden": 256,
            "dtype": dtype,
            "max_tokens": 301,
            "packet_tokens": 64,
        }
        | sizes
    )


def choose(shape: ExchangeShape, routing: str, num_tokens: int) -> torch.Tensor:
    """Ids [T, K], some of them no expert's."""
    num_experts, top_k = shape.num_experts, shape.top_k
    scores = torch.rand(num_tokens, num_experts)
    if routing == "zipf":
        scores *= 1 / torch.arange(1, num_experts + 1)
    ids_TK = scores.topk(min(top_k, num_experts)).indices
    if routing == "one expert":
        ids_TK = torch.full_like(ids_TK, -1)
        ids_TK[:, 0] = num_experts - 1
    if routing == "one rank":
        ids_TK %= num_experts // shape.num_ranks
    if routing == "nothing":
        return torch.full_like(ids_TK, -1)
    ids_TK[torch.rand(ids_TK.shape) < 0.1] = -1
    ids_TK[torch.rand(num_tokens) < 0.1] = -1
    return ids_TK


def random_tokens(
    shape: ExchangeShape, num_tokens: int, choose: Callable[[int], torch.Tensor]
) -> Tokens:
    """Tokens with random rows and weights and the ids that ``choose(num_tokens)`` says.

    Drawn on the CPU: from a seed they are the same for every process.
    """
    x_TH = torch.randn(num_tokens, shape.hidden).to(device="cuda", dtype=shape.dtype)
    weights_TK = torch.rand(num_tokens, shape.top_k).to(device="cuda")
    ids_TK = choose(num_tokens).to(device="cuda", dtype=torch.int32).view(-1, shape.top_k)
    return Tokens(x_TH, ids_TK, weights_TK)


def tokens_of_ranks(shape: ExchangeShape, routing: str, counts: Sequence[int]) -> list[Tokens]:
    """So many of each rank."""
    return [
        random_tokens(shape, count, lambda number: choose(shape, routing, number))
        for count in counts
    ]


def scaling_experts(shape: ExchangeShape, rank: int, factors_E: torch.Tensor) -> Experts:
    """Experts that multiply by a factor each; NaN for choices that are not of the rank."""
    num_local = shape.num_experts // shape.num_ranks
    local_E = factors_E[rank * num_local : (rank + 1) * num_local]

    def work(received: Received) -> torch.Tensor:
        factors_RK = local_E[received.slot_ids_RK.clamp(min=0)]
        factors_RK = torch.where(received.slot_ids_RK >= 0, factors_RK, torch.nan)
        y_RKH = received.x_RH[:, None] * factors_RK[..., None].to(shape.dtype)
        return y_RKH.flatten(0, 1)

    return work


def expected_outputs(
    shape: ExchangeShape, ranks: Sequence[Tokens], step_tokens: int, experts: Sequence[Experts]
) -> tuple[list[Arrivals], list[torch.Tensor]]:
    """What the reference says that each rank receives and gets back."""
    arrivals = reference.dispatch(ranks, shape.num_experts, step_tokens, fp8=shape.fp8)
    sums = [
        reference.presum(work(Received(a.x_RH, a.slots_RK, a.weights_RK)), a)
        for work, a in zip(experts, arrivals, strict=True)
    ]
    return arrivals, reference.combine(sums, ranks, shape.num_experts, step_tokens)


def assert_received(found: Received, right: Arrivals) -> None:
    """The same bits, wherever somebody reads them."""
    assert torch.equal(found.slot_ids_RK, right.slots_RK)
    is_here_RK = right.slots_RK >= 0
    assert torch.equal(found.weights_RK[is_here_RK], right.weights_RK[is_here_RK])
    is_here_R = is_here_RK.any(dim=1)
    assert torch.equal(found.x_RH[is_here_R], right.x_RH[is_here_R])


@dataclass(frozen=True)
class Soaking:
    """A rank that exchanges random tokens again and again, and counts what came back wrong."""

    domain: NvlinkDomain
    stream: torch.cuda.Stream
    factors_E: torch.Tensor
    num_wrong: torch.Tensor
    kept: list[object] = field(default_factory=list)

    def graph(self, step_tokens: int) -> torch.cuda.CUDAGraph:
        """One exchange of whole numbers, whose sums are exact and the right ones cheap."""
        shape = self.domain.shape
        experts = scaling_experts(shape, self.domain.shard.rank, self.factors_E)
        exchange = NvlinkExchange(self.domain, step_tokens)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog, a thread, may use the device meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            scores = torch.rand(step_tokens, shape.num_experts, device="cuda")
            ids_TK = scores.topk(shape.top_k).indices.int()
            ids_TK = torch.where(scores[:, : shape.top_k] < 0.2, -1, ids_TK)
            weights_TK = torch.randint(0, 4, (step_tokens, shape.top_k), device="cuda").float()
            x_TH = torch.randint(-8, 9, (step_tokens, shape.hidden), device="cuda").float()
            arrived = exchange.dispatch(x_TH, ids_TK, weights_TK)
            made = ExpertOutputs(experts(arrived), arrived.slot_ids_RK, arrived.weights_RK)
            out_TH = summed(exchange.combine(made, arrived))
            factors_TK = torch.where(ids_TK >= 0, self.factors_E[ids_TK.clamp(min=0)], 0)
            right_TH = x_TH * (weights_TK * factors_TK).sum(dim=1, keepdim=True)
            self.num_wrong.add_((out_TH != right_TH).sum())
        self.kept.append((experts, made, out_TH))
        return graph
