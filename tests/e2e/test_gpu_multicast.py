"""The all-reduce by multicast between ranks with a GPU each: sums, graphs, who stalls.

Making multicast objects can fail on machines that report them, so this is skipped unless somebody
asks for it (`tests.hopper_device.need_multicast`). It has never been run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_engine.dist.exchange.domain import NvlinkDomain, join_domain
from moe_engine.dist.groups import ParallelGroups
from moe_engine.errors import ExchangeTimeout
from tests.dist.ranks import run_on_ranks
from tests.hopper_device import need_multicast
from tests.kernels.exchange_work import shape_of

NUM_RANKS = 2
RUN_TIMEOUT = 240  # seconds of a test's ranks, their starts included
PATIENCE = 20.0  # seconds that ranks wait for each other where none is to be missed
SHORT_PATIENCE = 2.0
PACKET_ROWS, MAX_ROWS = 8, 301
ROUNDS = 300


@pytest.fixture(autouse=True)
def ranks_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    need_multicast(NUM_RANKS)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")


def join(
    groups: ParallelGroups, dtype: torch.dtype, hidden: int, timeout: float = PATIENCE
) -> NvlinkDomain:
    """This rank's domain; all ranks draw the same numbers on the CPU from here on."""
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = {"max_tokens": 1, "reduced_rows": PACKET_ROWS, "multicast_rows": MAX_ROWS}
    return join_domain(
        shape_of(NUM_RANKS, dtype, hidden=hidden, **sizes), groups.ep, device, timeout
    )


def random_parts(domain: NvlinkDomain, num_rows: int) -> list[torch.Tensor]:
    """What each rank brings: small whole numbers, whose sums are exact in any order."""
    shape = domain.shape
    return [
        torch.randint(-9, 10, (num_rows, shape.hidden)).to("cuda", shape.dtype)
        for _ in range(NUM_RANKS)
    ]


def check(domain: NvlinkDomain, num_rows: int) -> None:
    parts = random_parts(domain, num_rows)
    out_TH = domain.all_reduce(parts[domain.shard.rank], range(NUM_RANKS))
    torch.cuda.synchronize()
    domain.check()
    assert torch.equal(out_TH, sum(parts)), num_rows


def sums(groups: ParallelGroups) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for hidden in (8, 2880, 4096):
            domain = join(groups, dtype, hidden)
            for num_rows in (9, 1, 10, 133, MAX_ROWS, 8, 9):
                check(domain, num_rows)
            groups.ep.meet()


def many_in_a_row(groups: ParallelGroups) -> None:
    """Graphs of sums of both kinds; what is written too early would be summed."""
    domain = join(groups, torch.float32, 256)
    ranks, own = range(NUM_RANKS), domain.shard.rank
    few, many = random_parts(domain, PACKET_ROWS), random_parts(domain, MAX_ROWS)
    few_TH, many_TH = torch.zeros_like(few[0]), torch.zeros_like(many[0])
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog, a thread, may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        many_TH += domain.all_reduce(domain.all_reduce(many[own], ranks), ranks)
        few_TH += domain.all_reduce(domain.all_reduce(few[own], ranks), ranks)
    torch.cuda.synchronize()
    groups.ep.meet()
    for _ in range(ROUNDS):
        graph.replay()
    torch.cuda.synchronize()
    domain.check()
    assert torch.equal(few_TH, sum(few) * NUM_RANKS * ROUNDS)
    assert torch.equal(many_TH, sum(many) * NUM_RANKS * ROUNDS)
    groups.ep.meet()


def stall(groups: ParallelGroups) -> None:
    """Rank 1 leaves a sum out; rank 0 names it, and both go on after a reset."""
    domain = join(groups, torch.bfloat16, 256, SHORT_PATIENCE)
    check(domain, MAX_ROWS)
    if domain.shard.rank == 0:
        domain.all_reduce(random_parts(domain, MAX_ROWS)[0], range(NUM_RANKS))
        torch.cuda.synchronize()
        with pytest.raises(ExchangeTimeout, match=r"rank 1 has sent nothing .* all-reduce"):
            domain.check()
    groups.ep.meet()
    domain.reset()
    groups.ep.meet()
    torch.manual_seed(1)
    check(domain, MAX_ROWS)


@pytest.mark.parametrize("function", [sums, many_in_a_row, stall])
def test_sums_in_the_network(function: Callable[[ParallelGroups], None]) -> None:
    run_on_ranks(function, NUM_RANKS, 1, timeout=RUN_TIMEOUT, device_type="cuda")
