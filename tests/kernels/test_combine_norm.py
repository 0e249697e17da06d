"""Combine, residual addition and norm in one launch, among virtual ranks on one GPU."""

from __future__ import annotations

import time

import pytest
import torch

from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.errors import ExchangeTimeout
from moe_engine.ops.moe import ExpertOutputs
from tests.kernels.combine_norm_work import check_normed, random_norms
from tests.kernels.exchange_work import (
    ROUTINGS,
    choose,
    expected_outputs,
    random_tokens,
    scaling_experts,
    shape_of,
    tokens_of_ranks,
)
from tests.kernels.virtual_ranks import VirtualRanks, check, random_ranks

pytestmark = pytest.mark.usefixtures("needs_hopper")

TIMEOUT = 0.2
MAX_TOKENS = 64
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Rows of one, two and three packets for each thread of a block, which end anywhere.
HIDDEN = [8, 256, 2048, 3072, 4096, 6144, 7168, 8192, 9216]


def fits(hidden: int, dtype: torch.dtype) -> bool:
    """Whether a block takes a row."""
    return hidden * dtype.itemsize <= 18432


@pytest.mark.parametrize(
    ("hidden", "dtype"), [(h, dtype) for h in HIDDEN for dtype in DTYPES if fits(h, dtype)]
)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_stream_has_the_bits_of_the_reference(
    num_ranks: int, hidden: int, dtype: torch.dtype
) -> None:
    world = VirtualRanks(shape_of(num_ranks, dtype, hidden=hidden, max_tokens=MAX_TOKENS))
    for step_tokens in (1, 7, 64):
        for routing in ("uniform", "one expert", "nothing"):
            check_normed(world, random_ranks(world.shape, routing, step_tokens), step_tokens)


@pytest.mark.parametrize("counts", [(0, 64), (64, 0), (0, 0)])
def test_ranks_may_bring_nothing(counts: tuple[int, int]) -> None:
    world = VirtualRanks(shape_of(2, max_tokens=MAX_TOKENS))
    for _ in range(3):
        check_normed(world, tokens_of_ranks(world.shape, "uniform", counts), 64)


@pytest.mark.parametrize(
    ("hidden", "dtype", "step_tokens"),
    [(16384, torch.bfloat16, 7), (8192, torch.float32, 7), (256, torch.bfloat16, 65)],
)
def test_long_rows_and_many_are_combined_by_themselves(
    hidden: int, dtype: torch.dtype, step_tokens: int
) -> None:
    world = VirtualRanks(shape_of(2, dtype, hidden=hidden, max_tokens=65))
    ranks = random_ranks(world.shape, "uniform", step_tokens)
    factors_E = torch.ones(world.shape.num_experts, device="cuda")
    experts = [scaling_experts(world.shape, rank, factors_E) for rank in range(2)]
    torch.cuda.synchronize()
    _, found = world.exchange(ranks, step_tokens, experts, finish=lambda _, combined: combined)
    world.finish()
    assert all(isinstance(combined, torch.Tensor) for combined in found)


def test_combines_with_and_without_a_norm_take_turns() -> None:
    world = VirtualRanks(shape_of(4))
    for step_tokens in (3, 64, 100, 1, 64):
        ranks = random_ranks(world.shape, "uniform", step_tokens)
        check(world, ranks, step_tokens)
        if step_tokens <= world.shape.packet_tokens:
            check_normed(world, ranks, step_tokens)
            check_normed(world, ranks, step_tokens)


@pytest.mark.parametrize("hidden", [256, 4096])
@pytest.mark.parametrize("step_tokens", [4, 64])
@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_graphs_take_any_routing(num_ranks: int, step_tokens: int, hidden: int) -> None:
    world = VirtualRanks(shape_of(num_ranks, hidden=hidden, max_tokens=MAX_TOKENS))
    shape = world.shape
    factors_E = torch.randn(shape.num_experts, device="cuda")
    experts = [scaling_experts(shape, rank, factors_E) for rank in range(num_ranks)]
    full = tokens_of_ranks(shape, "uniform", [step_tokens] * num_ranks)
    norms = random_norms(shape, full)
    graphs, found = world.capture(full, step_tokens, experts, norms)
    for routing in [*ROUTINGS, "uniform"]:
        for tokens, residual in zip(full, norms.residuals, strict=True):
            tokens.ids_TK.copy_(choose(shape, routing, step_tokens))
            tokens.x_TH.normal_()
            residual.normal_()
        torch.cuda.synchronize()
        world.replay(graphs)
        world.finish()
        _, combined = expected_outputs(shape, full, step_tokens, experts)
        norms.check(found, combined)


@pytest.mark.parametrize("step_tokens", [8, 64])
def test_a_rank_that_stalls_is_named_and_all_go_on_after_a_reset(step_tokens: int) -> None:
    num_ranks, stalled = 4, 2
    world = VirtualRanks(shape_of(num_ranks), timeout=TIMEOUT)
    shape = world.shape
    ranks = random_ranks(shape, "uniform", step_tokens)
    check_normed(world, ranks, step_tokens)
    # Experts of all ranks, so that everybody waits for the one that stalls.
    everywhere_K = torch.arange(shape.top_k) * shape.num_experts // shape.top_k
    full = [
        random_tokens(shape, step_tokens, lambda n: everywhere_K.expand(n, -1).contiguous())
        for _ in range(num_ranks)
    ]
    norms = random_norms(shape, full)
    factors_E = torch.ones(shape.num_experts, device="cuda")
    torch.cuda.synchronize()
    start = time.monotonic()
    exchanges = [NvlinkExchange(domain, step_tokens) for domain in world.domains]
    received = []
    for exchange, stream, tokens in zip(exchanges, world.streams, full, strict=True):
        with torch.cuda.stream(stream):
            received.append(exchange.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK))
    for rank, arrived in enumerate(received):
        if rank == stalled:
            continue
        with torch.cuda.stream(world.streams[rank]):
            y_PH = scaling_experts(shape, rank, factors_E)(arrived)
            made = ExpertOutputs(y_PH, arrived.slot_ids_RK, arrived.weights_RK)
            norms(rank, exchanges[rank].combine(made, arrived))
    torch.cuda.synchronize()
    assert TIMEOUT <= time.monotonic() - start < 10 * TIMEOUT
    for rank, domain in enumerate(world.domains):
        if rank == stalled:
            domain.check()  # it waits for nobody
            continue
        with pytest.raises(ExchangeTimeout, match=f"rank {stalled} has sent nothing") as raised:
            domain.check()
        assert (raised.value.phase, raised.value.number) == ("combine", 2)
    for domain in world.domains:
        domain.reset()
    check(world, ranks, step_tokens)
    check_normed(world, ranks, step_tokens)
