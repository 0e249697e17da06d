"""The exchange's kernels among virtual ranks on one GPU: bits, graphs, a soak, and who stalls."""

from __future__ import annotations

import time

import pytest
import torch

from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.errors import ExchangeTimeout
from moe_engine.ops.moe import ExpertOutputs, summed
from moe_engine.ops.reference import exchange as reference
from tests.kernels.exchange_work import (
    ROUTINGS,
    Soaking,
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
NUM_RANKS = [1, 2, 3, 4, 8, 16]
# Of a step, by packets up to 64 and by rows beyond; chunks of a flag are 4.
STEP_TOKENS = [1, 2, 7, 64, 65, 96, 301]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_bits_are_those_of_the_reference(num_ranks: int, routing: str) -> None:
    world = VirtualRanks(shape_of(num_ranks))
    for step_tokens in STEP_TOKENS:
        check(world, random_ranks(world.shape, routing, step_tokens), step_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [512, 2048, 2560, 4096])
@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_rows_in_8_bits(num_ranks: int, hidden: int, dtype: torch.dtype) -> None:
    world = VirtualRanks(shape_of(num_ranks, dtype, hidden=hidden, fp8=True))
    for step_tokens in (1, 64, 65, 301):
        ranks = random_ranks(world.shape, "uniform", step_tokens)
        for tokens in ranks:
            # Groups of zeros, of values far apart, and of the smallest that there are.
            tokens.x_TH[:, :128] = 0
            tokens.x_TH[:, 128:256] *= torch.logspace(-6, 2, 128, device="cuda").to(dtype)
            tokens.x_TH[:, 256:384] = torch.finfo(dtype).smallest_normal
        check(world, ranks, step_tokens)


@pytest.mark.parametrize("step_tokens", [5, 100])
def test_rows_that_are_summed_already_go_home_as_they_are(step_tokens: int) -> None:
    world = VirtualRanks(shape_of(3))
    ranks = random_ranks(world.shape, "uniform", step_tokens)
    exchanges = [NvlinkExchange(domain, step_tokens) for domain in world.domains]
    received, outputs = [], []
    for exchange, stream, tokens in zip(exchanges, world.streams, ranks, strict=True):
        with torch.cuda.stream(stream):
            received.append(exchange.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK))
    for exchange, stream, arrived in zip(exchanges, world.streams, received, strict=True):
        with torch.cuda.stream(stream):
            outputs.append(summed(exchange.combine(arrived.x_RH, arrived)))
    world.finish()
    arrivals = reference.dispatch(ranks, world.shape.num_experts, step_tokens)
    sums = [arrived.x_RH for arrived in arrivals]
    expected = reference.combine(sums, ranks, world.shape.num_experts, step_tokens)
    for found, right in zip(outputs, expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_other_types(num_ranks: int, dtype: torch.dtype) -> None:
    world = VirtualRanks(shape_of(num_ranks, dtype, num_experts=num_ranks * 9))
    for step_tokens in (3, 64, 65):
        check(world, random_ranks(world.shape, "uniform", step_tokens), step_tokens)


@pytest.mark.parametrize("hidden", [8, 16, 2048, 2880, 4096, 7168])
@pytest.mark.parametrize("top_k", [1, 2, 32])
def test_other_sizes(hidden: int, top_k: int) -> None:
    shape = shape_of(3, hidden=hidden, top_k=top_k, num_experts=36, max_tokens=100)
    world = VirtualRanks(shape)
    for step_tokens in (5, 100):
        check(world, random_ranks(shape, "uniform", step_tokens), step_tokens)


@pytest.mark.parametrize("step_tokens", [4, 64, 200])
@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_graphs_take_any_routing(num_ranks: int, step_tokens: int) -> None:
    world = VirtualRanks(shape_of(num_ranks))
    shape = world.shape
    factors_E = torch.randn(shape.num_experts, device="cuda")
    experts = [scaling_experts(shape, rank, factors_E) for rank in range(num_ranks)]
    full = [
        random_tokens(shape, step_tokens, lambda n: choose(shape, "uniform", n))
        for _ in range(num_ranks)
    ]
    graphs, outputs = world.capture(full, step_tokens, experts)
    for routing in [*ROUTINGS, "uniform"]:
        for tokens in full:
            tokens.ids_TK.copy_(choose(shape, routing, step_tokens))
            tokens.x_TH.normal_()
        torch.cuda.synchronize()
        world.replay(graphs)
        world.finish()
        _, expected = expected_outputs(shape, full, step_tokens, experts)
        for found, right in zip(outputs, expected, strict=True):
            assert torch.equal(found, right)


def test_the_next_step_waits_for_results_that_a_rank_sends_to_itself() -> None:
    """Rank 0 has all the work, and rank 1 sends the next step's rows over those of this one."""
    shape = shape_of(2, hidden=4096, max_tokens=2048)
    world = VirtualRanks(shape)
    factors_E = torch.randn(shape.num_experts, device="cuda")
    experts = [scaling_experts(shape, rank, factors_E) for rank in range(2)]
    steps = []
    for step_tokens in (2048, 1100, 2047):
        ranks = tokens_of_ranks(shape, "one rank", [step_tokens, 1])
        steps.append((ranks, step_tokens, *world.capture(ranks, step_tokens, experts)))
    for _ in range(5):
        for _, _, _, outputs in steps:
            for out_TH in outputs:
                out_TH.zero_()
        torch.cuda.synchronize()
        for _, _, graphs, _ in steps:
            world.replay(graphs)
        world.finish()
        for ranks, step_tokens, _, outputs in steps:
            _, expected = expected_outputs(shape, ranks, step_tokens, experts)
            for found, right in zip(outputs, expected, strict=True):
                assert torch.equal(found, right)


@pytest.mark.parametrize(("num_ranks", "rounds"), [(2, 10_000), (4, 4000), (8, 2000)])
def test_a_soak_with_delays_and_steps_of_all_kinds(num_ranks: int, rounds: int) -> None:
    shape = shape_of(num_ranks, torch.float32, hidden=64, num_experts=8 * num_ranks)
    world = VirtualRanks(shape, timeout=20)
    factors_E = torch.randint(1, 5, (shape.num_experts,), device="cuda").float()
    soaking = [
        Soaking(domain, stream, factors_E, torch.zeros(1, dtype=torch.int64, device="cuda"))
        for domain, stream in zip(world.domains, world.streams, strict=True)
    ]
    sizes = [8, 40, 70, 100, 301]
    graphs = [[rank.graph(step_tokens) for step_tokens in sizes] for rank in soaking]
    torch.cuda._sleep(1)  # loaded here: that waits for all that runs
    torch.cuda.synchronize()
    choices = torch.randint(0, len(sizes), (rounds,)).tolist()
    delays = torch.randint(0, 200_000, (rounds, num_ranks)) * (torch.rand(rounds, num_ranks) < 0.02)
    for choice, of_rank in zip(choices, delays.tolist(), strict=True):
        for rank, own, cycles in zip(soaking, graphs, of_rank, strict=True):
            with torch.cuda.stream(rank.stream):
                if cycles:
                    torch.cuda._sleep(int(cycles))
                own[choice].replay()
    world.finish()
    assert [int(rank.num_wrong) for rank in soaking] == [0] * num_ranks
    assert [int(domain._counters[0]) for domain in world.domains] == [rounds + 1] * num_ranks


@pytest.mark.parametrize("step_tokens", [8, 100])
@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_a_rank_that_stalls_is_named_and_all_go_on_after_a_reset(
    phase: str, step_tokens: int
) -> None:
    num_ranks, stalled = 4, 2
    world = VirtualRanks(shape_of(num_ranks), timeout=TIMEOUT)
    ranks = random_ranks(world.shape, "uniform", step_tokens)
    check(world, ranks, step_tokens)
    full = [
        random_tokens(world.shape, step_tokens, lambda n: choose(world.shape, "uniform", n))
        for _ in range(num_ranks)
    ]
    for tokens in full:
        tokens.ids_TK.copy_(torch.rand(step_tokens, world.shape.num_experts).topk(8).indices)
    torch.cuda.synchronize()
    start = time.monotonic()
    exchanges = [NvlinkExchange(domain, step_tokens) for domain in world.domains]
    received = {}
    for rank, (exchange, stream) in enumerate(zip(exchanges, world.streams, strict=True)):
        if phase == "dispatch" and rank == stalled:
            continue
        with torch.cuda.stream(stream):
            received[rank] = exchange.dispatch(
                full[rank].x_TH, full[rank].ids_TK, full[rank].weights_TK
            )
    factors_E = torch.ones(world.shape.num_experts, device="cuda")
    for rank, arrived in received.items():
        if rank == stalled:
            continue
        with torch.cuda.stream(world.streams[rank]):
            # Slots are right or -1, whatever has not come: these would read beside their factors.
            y_PH = scaling_experts(world.shape, rank, factors_E)(arrived)
            made = ExpertOutputs(y_PH, arrived.slot_ids_RK, arrived.weights_RK)
            summed(exchanges[rank].combine(made, arrived))
    torch.cuda.synchronize()
    assert TIMEOUT <= time.monotonic() - start < 10 * TIMEOUT
    num_local = world.shape.num_experts // num_ranks
    for arrived in received.values():
        assert int(arrived.slot_ids_RK.min()) >= -1
        assert int(arrived.slot_ids_RK.max()) < num_local
    for rank, domain in enumerate(world.domains):
        if rank == stalled and phase == "dispatch":
            continue
        if rank == stalled:
            domain.check()  # it has ended its part, and waits for nobody
            continue
        with pytest.raises(ExchangeTimeout, match=f"rank {stalled} has sent nothing") as raised:
            domain.check()
        assert raised.value.phase == phase
        assert raised.value.number == 2
    for domain in world.domains:
        domain.reset()
    check(world, ranks, step_tokens)


def test_numbers_of_exchanges_go_round() -> None:
    world = VirtualRanks(shape_of(4))
    for domain in world.domains:
        domain._counters[0] = 0x7FFFFFFD
    for step_tokens in (3, 100, 100, 100, 3, 3, 100):
        check(world, random_ranks(world.shape, "uniform", step_tokens), step_tokens)
    assert [int(domain._counters[0]) for domain in world.domains] == [6] * 4


def test_steps_larger_than_the_buffers_are_refused() -> None:
    world = VirtualRanks(shape_of(2))
    with pytest.raises(ValueError, match="step_tokens is 302; it is from 1 to 301"):
        NvlinkExchange(world.domains[0], 302)
