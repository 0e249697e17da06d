"""Every exchange backend against one rank that holds all experts."""

import pytest
import torch
import torch.distributed as dist

from moe_engine.config import ExchangeConfig
from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange import ExchangeSelector, ExpertShard
from moe_engine.dist.exchange.collective import CollectiveExchange
from moe_engine.dist.exchange.hierarchical import HierarchicalExchange
from moe_engine.dist.exchange.replicas import Balancing, ReplicaTable
from moe_engine.dist.groups import ParallelGroups
from moe_engine.dist.layout import RankLayout, split_evenly
from moe_engine.ops.moe import expert_ffn, summed
from moe_engine.ops.reference import exchange as reference
from moe_engine.ops.reference.exchange import Tokens
from tests.dist.ranks import run_on_ranks

HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 8, 8, 3
ROUTINGS = ("random", "first experts", "last rank", "some to no expert")


def weights_and_tokens(seed, num_tokens, routing):
    """The same on every rank."""
    random = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=random)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=random)
    x = torch.randn(num_tokens, HIDDEN, generator=random)
    ids = torch.rand(num_tokens, EXPERTS, generator=random).argsort(dim=1)[:, :TOP_K]
    if routing == "first experts":
        ids = torch.arange(TOP_K).expand(num_tokens, TOP_K)
    elif routing == "last rank":
        ids = torch.tensor([EXPERTS - 1, EXPERTS - 2, 0]).expand(num_tokens, TOP_K)
    elif routing == "some to no expert":
        ids = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.5, -1)
    weights = torch.rand(num_tokens, TOP_K, generator=random)
    return gate_up, down, x, ids.to(torch.int32).contiguous(), weights


def check_against_one_rank(groups, backend, num_tokens_by_group, routing, dtype):
    selector = ExchangeSelector(ExchangeConfig(exchange=backend), groups, EXPERTS)
    exchange = selector.select(max(num_tokens_by_group))
    check_exchange(groups, exchange, num_tokens_by_group, routing, dtype)


def check_exchange(groups, exchange, num_tokens_by_group, routing, dtype):
    """Dispatch, run the local experts, combine; compare with all experts in one place."""
    layout = groups.layout
    num_tokens = num_tokens_by_group[layout.dp_rank]
    seed = 100 + layout.dp_rank + num_tokens
    gate_up, down, _, _, _ = weights_and_tokens(7, 0, routing)
    _, _, x, ids, weights = weights_and_tokens(seed, num_tokens, routing)
    gate_up, down, x = gate_up.to(dtype), down.to(dtype), x.to(dtype)
    rows = slice(0, num_tokens)
    if exchange.shards_tokens:
        counts = split_evenly(num_tokens, layout.attention_tp)
        first = sum(counts[: layout.tp_rank])
        rows = slice(first, first + counts[layout.tp_rank])
    shard = ExpertShard(EXPERTS, layout.world_size, layout.rank)
    local = slice(shard.rank * shard.num_local, (shard.rank + 1) * shard.num_local)
    received = exchange.dispatch(x[rows], ids[rows], weights[rows])
    y = expert_ffn(
        received.x_RH, received.slot_ids_RK, received.weights_RK, gate_up[local], down[local]
    )
    out = summed(exchange.combine(y, received))
    expected = summed(expert_ffn(x[rows], ids[rows], weights[rows], gate_up, down))
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * 50)


def pure_tp_cases(groups):
    for backend in ("collective", "replicated", "auto"):
        for num_tokens in (0, 1, 3, 64, 65):
            for routing in ROUTINGS:
                for dtype in (torch.float32, torch.bfloat16):
                    check_against_one_rank(groups, backend, [num_tokens], routing, dtype)


def mixed_cases(groups):
    for counts in ([0, 0], [5, 0], [0, 1], [7, 33], [2, 1]):
        for routing in ROUTINGS:
            check_against_one_rank(groups, "auto", counts, routing, torch.float32)


def replica_cases(groups):
    """Each rank has a copy of expert 0 besides its own; outputs are those without copies."""
    world, rank = groups.layout.world_size, groups.layout.rank
    num_local = EXPERTS // world + 1
    # Physical experts: a rank's own ones, and then expert 0.
    places = [[(e // 2 * num_local + e % 2, 1.0)] for e in range(EXPERTS)]
    places[0] = [(0, 1.0)] + [(r * num_local + num_local - 1, 1.0) for r in range(1, world)]
    table = ReplicaTable.make(places, world, torch.device("cpu"))
    exchange = CollectiveExchange(ExpertShard(world * num_local, world, rank), groups.ep)
    gate_up, down, _, _, _ = weights_and_tokens(7, 0, "random")
    own = [2 * rank, 2 * rank + 1, 0]
    total = torch.zeros(2, EXPERTS, dtype=torch.int32)
    for num_tokens in (0, 1, 40):
        for routing in ROUTINGS:
            _, _, x, ids, weights = weights_and_tokens(50 + rank, num_tokens, routing)
            tags = (2 * torch.arange(num_tokens) + rank % 2).to(torch.int32)
            load = torch.zeros(2, EXPERTS, dtype=torch.int32)
            received = exchange.dispatch(x, ids, weights, Balancing(tags, table, load))
            y = expert_ffn(
                received.x_RH,
                received.slot_ids_RK,
                received.weights_RK,
                gate_up[own],
                down[own],
            )
            out = exchange.combine(y, received)
            expected = summed(expert_ffn(x, ids, weights, gate_up, down))
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-3)
            counted = torch.bincount(ids[ids >= 0], minlength=EXPERTS)
            assert torch.equal(load[rank % 2].long(), counted)
            assert not load[1 - rank % 2].any()
            total += load
            if routing == "first experts" and num_tokens == 40:
                # Expert 0, which all tokens want, is everywhere.
                assert (received.slot_ids_RK[:, 0] == (0 if rank == 0 else 2)).any()
    assert total.any()


def hierarchical_cases(groups):
    """Four ranks in two domains."""
    rank = groups.layout.rank
    domain, place = divmod(rank, 2)
    rails = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    domains = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    sent = []
    across = CollectiveExchange(
        ExpertShard(EXPERTS, 2, domain), Counting(2, domain, rails[place], sent)
    )
    inside = CollectiveExchange(
        ExpertShard(EXPERTS // 2, 2, place), Communicator(2, place, domains[domain])
    )
    exchange = HierarchicalExchange(across, inside)
    assert exchange.shards_tokens
    assert not exchange.is_capturable
    for counts in ([0] * 4, [1] * 4, [5, 0, 3, 1], [9, 0, 17, 40]):
        for routing in ROUTINGS:
            for dtype in (torch.float32, torch.bfloat16):
                sent.clear()
                check_exchange(groups, exchange, counts, routing, dtype)
                # The counts, the tokens, and the sums that go home.
                _, there, back = sent
                _, _, _, ids, _ = weights_and_tokens(
                    100 + rank + counts[rank], counts[rank], routing
                )
                domains_of = [{i // 4 for i in row if i >= 0} for row in ids.tolist()]
                assert there == [sum(d in of for of in domains_of) for d in range(2)]
                assert sum(back) == sum(sent_to_me(groups, counts, routing, domain, place))


def sent_to_me(groups, counts, routing, domain, place):
    """Tokens that the ranks of a number have for a domain's experts."""
    for rank in (place, place + 2):
        _, _, _, ids, _ = weights_and_tokens(100 + rank + counts[rank], counts[rank], routing)
        yield sum(any(i // 4 == domain for i in row if i >= 0) for row in ids.tolist())


class Counting(Communicator):
    """Notes how many rows each all-to-all sends to each rank."""

    def __init__(self, size, rank, group, sent):
        super().__init__(size, rank, group)
        self._sent = sent

    def all_to_all_rows(self, x_TH, send_counts, recv_counts):
        self._sent.append(send_counts)
        return super().all_to_all_rows(x_TH, send_counts, recv_counts)


def reference_cases(groups):
    """Rows, slots, weights and sums are the reference's, in its order."""
    world, rank = groups.layout.world_size, groups.layout.rank
    exchange = ExchangeSelector(ExchangeConfig(exchange="collective"), groups, EXPERTS).select(1)
    for counts in ([0] * world, [1] * world, list(range(world)), [9, 0, 17, 4][:world]):
        for routing in ROUTINGS:
            ranks = [
                Tokens(*weights_and_tokens(3 + r, n, routing)[2:]) for r, n in enumerate(counts)
            ]
            step_tokens = max(1, *counts)
            arrivals = reference.dispatch(ranks, EXPERTS, step_tokens)
            # The rows alone, without slots for those that do not come.
            comes = [(arrived.slots_RK >= 0).any(dim=1) for arrived in arrivals]
            own, mine, come_R = ranks[rank], arrivals[rank], comes[rank]
            received = exchange.dispatch(own.x_TH, own.ids_TK, own.weights_TK)
            assert torch.equal(received.x_RH, mine.x_RH[come_R])
            assert torch.equal(received.slot_ids_RK, mine.slots_RK[come_R])
            is_here_RK = received.slot_ids_RK >= 0
            assert torch.equal(received.weights_RK[is_here_RK], mine.weights_RK[come_R][is_here_RK])
            random = torch.Generator().manual_seed(1)
            sums = [torch.randn(arrived.x_RH.shape, generator=random) for arrived in arrivals]
            out = exchange.combine(sums[rank][come_R], received)
            expected = reference.combine(sums, ranks, EXPERTS, step_tokens)
            torch.testing.assert_close(out, expected[rank], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("cases", "tp", "dp"),
    [
        (pure_tp_cases, 2, 1),
        (mixed_cases, 2, 2),
        (reference_cases, 4, 1),
        (hierarchical_cases, 1, 4),
        (replica_cases, 1, 4),
    ],
)
def test_exchange_matches_all_experts_in_one_place(cases, tp, dp):
    run_on_ranks(cases, tp, dp)


def test_local_exchange_moves_nothing():
    groups = ParallelGroups(RankLayout(0, 1, 1), Communicator(1, 0), Communicator(1, 0))
    for backend in ("auto", "local", "replicated", "collective"):
        for num_tokens in (0, 1, 9):
            check_against_one_rank(groups, backend, [num_tokens], "random", torch.float32)


def test_reference_sends_one_copy_per_rank_and_sums_all_experts():
    counts = [5, 0, 3, 1]
    gate_up, down, _, _, _ = weights_and_tokens(7, 0, "random")
    ranks = [Tokens(*weights_and_tokens(20 + r, n, "random")[2:]) for r, n in enumerate(counts)]
    arrivals = reference.dispatch(ranks, EXPERTS, max(counts))
    copies = sum(len({expert // 2 for expert in row}) for t in ranks for row in t.ids_TK.tolist())
    assert sum(int((a.slots_RK >= 0).any(dim=1).sum()) for a in arrivals) == copies
    sums = [
        summed(
            expert_ffn(
                arrived.x_RH,
                arrived.slots_RK,
                arrived.weights_RK,
                gate_up[2 * rank : 2 * rank + 2],
                down[2 * rank : 2 * rank + 2],
            )
        )
        for rank, arrived in enumerate(arrivals)
    ]
    outputs = reference.combine(sums, ranks, EXPERTS, max(counts))
    for tokens, out in zip(ranks, outputs, strict=True):
        expected = summed(expert_ffn(tokens.x_TH, tokens.ids_TK, tokens.weights_TK, gate_up, down))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
