"""The exchange's kernels between ranks with a GPU each: bits, a soak, who stops, a whole engine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_engine import MoEEngine
from moe_engine.dist.exchange.base import Received
from moe_engine.dist.exchange.domain import ExchangeShape, NvlinkDomain, join_domain
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.dist.groups import ParallelGroups
from moe_engine.errors import ExchangeTimeout
from moe_engine.ops.moe import ExpertOutputs, summed
from moe_engine.ops.reference.exchange import Tokens
from tests.dist.ranks import run_on_ranks
from tests.e2e.test_virtual_world import requests_of
from tests.hopper_device import need_hoppers
from tests.kernels.exchange_work import (
    ROUTINGS,
    Experts,
    Soaking,
    assert_received,
    expected_outputs,
    scaling_experts,
    shape_of,
    tokens_of_ranks,
)
from tests.unit.runner_world import LIMITS, MODEL

NUM_RANKS = 2
RUN_TIMEOUT = 240  # seconds of a test's ranks, their starts included
PATIENCE = 20.0  # seconds that ranks wait for each other where none is to be missed
SHORT_PATIENCE = 2.0
SOAK_ROUNDS = 3000
# By packets up to 64 tokens, and by rows.
STEP_TOKENS = [1, 7, 64, 65, 96, 301]


@pytest.fixture(autouse=True)
def ranks_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    need_hoppers(NUM_RANKS)
    # NCCL's multicast, which not every system that offers it can do.
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")


def run(function: Callable[[ParallelGroups], None]) -> None:
    run_on_ranks(function, NUM_RANKS, 1, timeout=RUN_TIMEOUT, device_type="cuda")


def join(groups: ParallelGroups, shape: ExchangeShape, timeout: float = PATIENCE) -> NvlinkDomain:
    """This rank's domain; all ranks draw the same numbers on the CPU from here on."""
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    return join_domain(shape, groups.ep, device, timeout)


def exchange(
    domain: NvlinkDomain, step_tokens: int, tokens: Tokens, work: Experts
) -> tuple[Received, torch.Tensor]:
    """Dispatch, experts, combine on the current stream, not waited for."""
    step = NvlinkExchange(domain, step_tokens)
    arrived = step.dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK)
    made = ExpertOutputs(work(arrived), arrived.slot_ids_RK, arrived.weights_RK)
    return arrived, summed(step.combine(made, arrived))


def random_experts(shape: ExchangeShape) -> list[Experts]:
    """Of each rank."""
    factors_E = torch.randn(shape.num_experts).cuda()
    return [scaling_experts(shape, rank, factors_E) for rank in range(shape.num_ranks)]


def finish(domain: NvlinkDomain) -> None:
    torch.cuda.synchronize()
    domain.check()


def check(
    groups: ParallelGroups, domain: NvlinkDomain, routing: str, step_tokens: int, *counts: int
) -> None:
    """One exchange of so many tokens of each rank."""
    rank = domain.shard.rank
    ranks = tokens_of_ranks(domain.shape, routing, counts)
    experts = random_experts(domain.shape)
    received, out_TH = exchange(domain, step_tokens, ranks[rank], experts[rank])
    finish(domain)
    arrivals, expected = expected_outputs(domain.shape, ranks, step_tokens, experts)
    assert_received(received, arrivals[rank])
    assert torch.equal(out_TH, expected[rank]), (routing, step_tokens, counts)
    groups.ep.meet()  # rows lie where the next exchange's will


def check_graph(
    groups: ParallelGroups, domain: NvlinkDomain, step_tokens: int, counts: Sequence[int]
) -> None:
    """A graph of one exchange, replayed with tokens of all routings."""
    rank = domain.shard.rank
    own = tokens_of_ranks(domain.shape, "uniform", counts)[rank]
    experts = random_experts(domain.shape)
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog, a thread, may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        _, out_TH = exchange(domain, step_tokens, own, experts[rank])
    for routing in [*ROUTINGS, "uniform"]:
        ranks = tokens_of_ranks(domain.shape, routing, counts)
        own.x_TH.copy_(ranks[rank].x_TH)
        own.ids_TK.copy_(ranks[rank].ids_TK)
        own.weights_TK.copy_(ranks[rank].weights_TK)
        graph.replay()
        finish(domain)
        _, expected = expected_outputs(domain.shape, ranks, step_tokens, experts)
        assert torch.equal(out_TH, expected[rank]), (routing, step_tokens, counts)
    groups.ep.meet()


def check_bits(groups: ParallelGroups, **sizes: Any) -> None:
    domain = join(groups, shape_of(NUM_RANKS, **sizes))
    for step_tokens in STEP_TOKENS:
        some = step_tokens // 2
        for counts in ((step_tokens, some), (step_tokens, 0), (0, step_tokens), (0, 0)):
            for routing in ROUTINGS:
                check(groups, domain, routing, step_tokens, *counts)
        for counts in ((step_tokens, step_tokens), (0, step_tokens)):
            check_graph(groups, domain, step_tokens, counts)


def check_bits_of_bfloat16(groups: ParallelGroups) -> None:
    check_bits(groups)


def check_bits_of_fp8(groups: ParallelGroups) -> None:
    check_bits(groups, hidden=512, fp8=True)


@pytest.mark.parametrize("function", [check_bits_of_bfloat16, check_bits_of_fp8])
def test_bits_are_those_of_the_reference(function: Callable[[ParallelGroups], None]) -> None:
    run(function)


def soak(groups: ParallelGroups) -> None:
    """Ranks go through the same exchanges, each with tokens and delays of its own."""
    shape = shape_of(NUM_RANKS, torch.float32, hidden=64, num_experts=8 * NUM_RANKS)
    domain = join(groups, shape)
    factors_E = torch.randint(1, 5, (shape.num_experts,)).float().cuda()
    choices = torch.randint(0, 5, (SOAK_ROUNDS,)).tolist()
    torch.manual_seed(1 + groups.layout.rank)
    num_wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    soaking = Soaking(domain, stream, factors_E, num_wrong)
    graphs = [soaking.graph(step_tokens) for step_tokens in (8, 40, 70, 100, 301)]
    delays = torch.randint(0, 400_000, (SOAK_ROUNDS,)) * (torch.rand(SOAK_ROUNDS) < 0.05)
    torch.cuda.synchronize()
    groups.ep.meet()
    with torch.cuda.stream(stream):
        for choice, cycles in zip(choices, delays.tolist(), strict=True):
            if cycles:
                torch.cuda._sleep(cycles)
            graphs[choice].replay()
    finish(domain)
    assert int(num_wrong) == 0
    assert int(domain._counters[0]) == SOAK_ROUNDS + 1
    groups.ep.meet()


def test_a_soak_with_delays_and_steps_of_all_kinds() -> None:
    run(soak)


def stop(groups: ParallelGroups) -> None:
    """Rank 1 leaves an exchange out; rank 0 names it, and both go on after a reset."""
    shape = shape_of(NUM_RANKS)
    domain = join(groups, shape, SHORT_PATIENCE)
    for step_tokens in (8, 100):
        check(groups, domain, "uniform", step_tokens, step_tokens, step_tokens)
        own = tokens_of_ranks(shape, "uniform", (step_tokens, step_tokens))[0]
        work = random_experts(shape)[0]
        torch.cuda.synchronize()
        groups.ep.meet()
        if groups.layout.rank == 0:
            start = time.monotonic()
            exchange(domain, step_tokens, own, work)
            torch.cuda.synchronize()
            assert SHORT_PATIENCE <= time.monotonic() - start < 5 * SHORT_PATIENCE
            with pytest.raises(
                ExchangeTimeout, match="rank 1 has sent nothing to rank 0"
            ) as raised:
                domain.check()
            assert raised.value.phase == "dispatch"
        groups.ep.meet()
        domain.reset()
        groups.ep.meet()
        check(groups, domain, "uniform", step_tokens, step_tokens, step_tokens)


def test_a_rank_that_stops_is_named_and_both_go_on_after_a_reset() -> None:
    run(stop)


def test_an_engines_tokens_in_float32_are_those_of_one_rank(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    prompts, params = zip(*requests_of(3, 30), strict=True)

    def tokens(**options: Any) -> list[list[int]]:
        options |= LIMITS | {"load_format": "dummy", "skip_tokenizer_init": True}
        with MoEEngine(str(tmp_path), device="cuda", dtype="float32", **options) as engine:
            results = engine.generate(prompts, params)
        return [list(result.outputs[0].token_ids) for result in results]

    assert tokens(attention_dp=NUM_RANKS, exchange="nvlink") == tokens()
