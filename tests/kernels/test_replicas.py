"""Replicas and counts in the exchange's dispatch, among virtual ranks on one GPU."""

from __future__ import annotations

import pytest
import torch

from moe_engine.dist.exchange.replicas import Balancing, ReplicaTable
from moe_engine.ops.reference.exchange import Tokens
from tests.kernels.exchange_work import (
    assert_received,
    choose,
    expected_outputs,
    random_tokens,
    scaling_experts,
    shape_of,
)
from tests.kernels.virtual_ranks import VirtualRanks

pytestmark = pytest.mark.usefixtures("needs_hopper")

NUM_EXPERTS = 40
CPU = torch.device("cpu")


def random_table(num_ranks: int, num_local: int, num_replicas: int) -> ReplicaTable:
    """Every expert at some ranks, with random shares; spare experts are at nobody's."""
    places = torch.randperm(num_ranks * num_local).tolist()
    spare = places[NUM_EXPERTS:]
    replicas = []
    for slot in places[:NUM_EXPERTS]:
        copies = [spare.pop() for _ in range(num_replicas - 1) if spare and torch.rand(()) < 0.5]
        replicas.append([(at, float(torch.rand(()))) for at in [slot, *copies]])
    return ReplicaTable.make(replicas, num_replicas, CPU)


def on_gpu(table: ReplicaTable) -> ReplicaTable:
    return ReplicaTable(table.slots_ER.cuda(), table.bounds_ER.cuda())


@pytest.mark.parametrize("num_replicas", [1, 2, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_tokens_go_to_the_replicas_of_the_reference(num_ranks: int, num_replicas: int) -> None:
    num_local = -(-NUM_EXPERTS // num_ranks) + 3
    shape = shape_of(num_ranks, num_experts=num_ranks * num_local, max_tokens=100)
    logical = shape_of(1, num_experts=NUM_EXPERTS)
    world = VirtualRanks(shape)
    factors_E = torch.randn(shape.num_experts, device="cuda")
    experts = [scaling_experts(shape, rank, factors_E) for rank in range(num_ranks)]
    for step_tokens in (1, 17, 64, 65, 100):
        table = random_table(num_ranks, num_local, num_replicas)
        there = on_gpu(table)
        counts = [step_tokens, 0, *torch.randint(0, step_tokens + 1, (num_ranks,)).tolist()]
        ranks = [
            random_tokens(logical, count, lambda n: choose(logical, "uniform", n))
            for count in counts[:num_ranks]
        ]
        tags = [torch.randint(-(1 << 31), 1 << 31, (len(tokens.ids_TK),)).int() for tokens in ranks]
        loads = [torch.randint(0, 9, (2, NUM_EXPERTS)).int() for _ in ranks]
        balancing = [
            Balancing(tags_T.cuda(), there, load_2E.cuda())
            for tags_T, load_2E in zip(tags, loads, strict=True)
        ]
        torch.cuda.synchronize()
        received, outputs = world.exchange(ranks, step_tokens, experts, balancing)
        world.finish()
        # The reference adds to the counts on the CPU.
        physical = [
            Tokens(
                tokens.x_TH,
                Balancing(tags_T, table, load_2E).apply(tokens.ids_TK.cpu()).cuda(),
                tokens.weights_TK,
            )
            for tokens, tags_T, load_2E in zip(ranks, tags, loads, strict=True)
        ]
        arrivals, expected = expected_outputs(shape, physical, step_tokens, experts)
        for found, right in zip(received, arrivals, strict=True):
            assert_received(found, right)
        for found, right in zip(received, physical, strict=True):
            assert torch.equal(found.route, right.ids_TK)
        for out_TH, right_TH in zip(outputs, expected, strict=True):
            assert torch.equal(out_TH, right_TH)
        for found, load_2E in zip(balancing, loads, strict=True):
            assert found.load_2E is not None
            assert torch.equal(found.load_2E.cpu(), load_2E)


@pytest.mark.parametrize("step_tokens", [8, 100])
def test_counts_alone_leave_ids_as_they_are(step_tokens: int) -> None:
    shape = shape_of(2, max_tokens=100)
    world = VirtualRanks(shape)
    factors_E = torch.randn(shape.num_experts, device="cuda")
    experts = [scaling_experts(shape, rank, factors_E) for rank in range(2)]
    # All tokens to one expert: one address is added to by all.
    ranks = [
        random_tokens(shape, step_tokens, lambda n: choose(shape, "one expert", n))
        for _ in range(2)
    ]
    tags = [torch.randint(0, 1 << 20, (step_tokens,)).int() for _ in ranks]
    balancing = [
        Balancing(
            tags_T.cuda(),
            load_2E=torch.zeros(2, shape.num_experts, dtype=torch.int32, device="cuda"),
        )
        for tags_T in tags
    ]
    torch.cuda.synchronize()
    _, outputs = world.exchange(ranks, step_tokens, experts, balancing)
    world.finish()
    _, expected = expected_outputs(shape, ranks, step_tokens, experts)
    for rank in range(2):
        assert torch.equal(outputs[rank], expected[rank])
        load_2E = torch.zeros(2, shape.num_experts, dtype=torch.int32)
        Balancing(tags[rank], load_2E=load_2E).apply(ranks[rank].ids_TK.cpu())
        assert torch.equal(balancing[rank].load_2E.cpu(), load_2E)
