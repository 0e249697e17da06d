"""The hierarchical exchange among virtual ranks in several domains, on one GPU: bits."""

from __future__ import annotations

import pytest
import torch

from moe_engine.dist.exchange.base import Received
from moe_engine.dist.exchange.domain import ExchangeShape, virtual_domains
from moe_engine.dist.exchange.hierarchical import HierarchicalExchange
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.ops.moe import ExpertOutputs
from moe_engine.ops.reference import exchange as reference
from moe_engine.ops.reference.exchange import Tokens
from tests.kernels.exchange_work import (
    ROUTINGS,
    Experts,
    choose,
    random_tokens,
    scaling_experts,
    shape_of,
)
from tests.kernels.virtual_ranks import make_room

pytestmark = pytest.mark.usefixtures("needs_hopper")

MAX_TOKENS = 100
STEP_TOKENS = [1, 20, 64, 100]


def expected_outputs(
    ranks: list[list[Tokens]], num_experts: int, step_tokens: int, experts: list[list[Experts]]
) -> list[list[torch.Tensor]]:
    """What the ranks [domains, size] get back: the reference's exchanges, one in the other."""
    num_domains, size = len(ranks), len(ranks[0])
    arrivals = [
        reference.dispatch([domain[place] for domain in ranks], num_experts, step_tokens)
        for place in range(size)
    ]
    of_domains = []
    for domain in range(num_domains):
        held = [
            Tokens(at.x_RH, at.slots_RK, at.weights_RK)
            for at in (arrivals[place][domain] for place in range(size))
        ]
        num_local = num_experts // num_domains
        inside = reference.dispatch(held, num_local, num_domains * step_tokens)
        sums = [
            reference.presum(work(Received(at.x_RH, at.slots_RK, at.weights_RK)), at)
            for work, at in zip(experts[domain], inside, strict=True)
        ]
        of_domains.append(reference.combine(sums, held, num_local, num_domains * step_tokens))
    outputs = [
        reference.combine(
            [of_domain[place] for of_domain in of_domains],
            [domain[place] for domain in ranks],
            num_experts,
            step_tokens,
        )
        for place in range(size)
    ]
    return [[outputs[place][domain] for place in range(size)] for domain in range(num_domains)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("num_domains", "size"), [(2, 1), (2, 2), (2, 4), (3, 2), (4, 4)])
def test_bits_are_those_of_the_reference(num_domains: int, size: int, routing: str) -> None:
    device = torch.device("cuda", 0)
    flat = shape_of(num_domains * size, max_tokens=MAX_TOKENS)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    share = max(1, multiprocessors // flat.num_ranks)

    def part(num_ranks: int, num_experts: int, max_tokens: int) -> ExchangeShape:
        return shape_of(num_ranks, num_experts=num_experts, max_tokens=max_tokens)

    across_shape = part(num_domains, flat.num_experts, MAX_TOKENS)
    inside_shape = part(size, flat.num_experts // num_domains, num_domains * MAX_TOKENS)
    rails = [virtual_domains(across_shape, device, 5.0, num_blocks=share) for _ in range(size)]
    domains = [
        virtual_domains(inside_shape, device, 5.0, num_blocks=share) for _ in range(num_domains)
    ]
    places = [(domain, place) for domain in range(num_domains) for place in range(size)]
    streams = {at: torch.cuda.Stream(device) for at in places}
    make_room(flat, list(streams.values()))
    factors_E = torch.randn(flat.num_experts, device=device)
    experts = [
        [scaling_experts(flat, domain * size + place, factors_E) for place in range(size)]
        for domain in range(num_domains)
    ]
    for step_tokens in STEP_TOKENS:
        counts = torch.randint(0, step_tokens + 1, (num_domains, size))
        counts[0, 0] = step_tokens
        ranks = [
            [
                random_tokens(flat, int(counts[domain, place]), lambda n: choose(flat, routing, n))
                for place in range(size)
            ]
            for domain in range(num_domains)
        ]
        torch.cuda.synchronize()
        exchanges = {
            (domain, place): HierarchicalExchange(
                NvlinkExchange(rails[place][domain], step_tokens),
                NvlinkExchange(domains[domain][place], num_domains * step_tokens),
            )
            for domain, place in places
        }
        received, made, outputs = {}, {}, {}
        for at in places:
            tokens = ranks[at[0]][at[1]]
            with torch.cuda.stream(streams[at]):
                received[at] = exchanges[at].dispatch(tokens.x_TH, tokens.ids_TK, tokens.weights_TK)
        for at in places:
            with torch.cuda.stream(streams[at]):
                y_PH = experts[at[0]][at[1]](received[at])
                made[at] = ExpertOutputs(y_PH, received[at].slot_ids_RK, received[at].weights_RK)
        for at in places:
            with torch.cuda.stream(streams[at]):
                outputs[at] = exchanges[at].combine(made[at], received[at])
        torch.cuda.synchronize()
        for group in [*rails, *domains]:
            for rank in group:
                rank.check()
        expected = expected_outputs(ranks, flat.num_experts, step_tokens, experts)
        for domain, place in places:
            assert torch.equal(outputs[domain, place], expected[domain][place]), (domain, place)
