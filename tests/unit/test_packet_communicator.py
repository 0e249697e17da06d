"""What of a TP group's collectives goes by packets, and what is left to torch."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_engine.config import ExchangeConfig
from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange import ExchangeSelector
from moe_engine.dist.exchange.domain import ExchangeShape
from moe_engine.dist.exchange.group import PacketCommunicator, rows_by_packets
from moe_engine.dist.exchange.nvlink import NvlinkExchange
from moe_engine.dist.exchange.replicated import ReplicatedExchange
from moe_engine.dist.groups import ParallelGroups
from moe_engine.dist.layout import RankLayout

HIDDEN, MAX_ROWS = 64, 4
SHAPE = ExchangeShape(
    num_ranks=4,
    num_experts=8,
    top_k=2,
    hidden=HIDDEN,
    dtype=torch.bfloat16,
    max_tokens=16,
    packet_tokens=2,
    replicated_tokens=6,
    reduced_rows=MAX_ROWS,
)


class Domain:
    """Rank 3 of 4, in whose group of ranks 2 and 3 both bring the same."""

    shape = SHAPE
    shard = SimpleNamespace(rank=3)

    def most_reduced_rows(self, ranks: range) -> int:
        return MAX_ROWS

    def all_reduce(self, x_TH: torch.Tensor, ranks: range) -> torch.Tensor:
        assert ranks == range(2, 4)
        assert 1 <= len(x_TH) <= MAX_ROWS
        return 2 * x_TH

    def all_gather(
        self, x: torch.Tensor, out: torch.Tensor, num_bytes: Sequence[int], ranks: range
    ) -> torch.Tensor:
        assert ranks == range(2, 4)
        assert x.is_contiguous()
        assert max(num_bytes) <= MAX_ROWS * SHAPE.row_bytes
        if num_bytes[1] == 0:
            return out.fill_(7)  # rank 2's
        parts = [x.reshape(-1)[: n // x.itemsize] for n in num_bytes]
        return out.copy_(torch.cat(parts).view(out.shape))


class Others(Communicator):
    """Torch's: the same ranks, and the same results, which they count."""

    def __init__(self, rank: int = 1) -> None:
        self.size, self.rank = 2, rank
        self.calls: list[str] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(f"sum of {x.dtype}")
        return x.mul_(2)

    def all_gather_rows(self, x_TH: torch.Tensor, counts: list[int]) -> torch.Tensor:
        self.calls.append("rows")
        return torch.cat([x_TH[:count] for count in counts])

    def gather_columns(self, x_TH: torch.Tensor) -> torch.Tensor | None:
        self.calls.append("columns")
        return None

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append("broadcast")
        return x.fill_(7)


@pytest.fixture
def others() -> Others:
    return Others()


@pytest.fixture
def group(others: Others) -> PacketCommunicator:
    return PacketCommunicator(others, Domain(), range(2, 4))  # type: ignore[arg-type]


def rows(number: int, dtype: torch.dtype = torch.bfloat16, width: int = HIDDEN) -> torch.Tensor:
    return torch.randint(0, 99, (number, width)).to(dtype)


@pytest.mark.parametrize("number", [0, 1, MAX_ROWS])
def test_few_rows_are_summed_by_packets(
    group: PacketCommunicator, others: Others, number: int
) -> None:
    for all_reduce in (group.all_reduce, group.all_reduce_rows):
        x_TH = rows(number)
        assert torch.equal(all_reduce(x_TH), 2 * x_TH)
    assert others.calls == []


@pytest.mark.parametrize("x_TH", [rows(MAX_ROWS + 1), rows(2, torch.float32), rows(2, width=32)])
def test_other_sums_are_left_to_torch(
    group: PacketCommunicator, others: Others, x_TH: torch.Tensor
) -> None:
    expected = 2 * x_TH
    assert torch.equal(group.all_reduce(x_TH.clone()), expected)
    assert torch.equal(group.all_reduce_rows(x_TH.clone()), expected)
    assert others.calls


def test_torch_sums_rows_in_float32_and_rounds_once(
    group: PacketCommunicator, others: Others
) -> None:
    x_TH = rows(MAX_ROWS + 1)
    assert torch.equal(group.all_reduce_rows(x_TH), 2 * x_TH)
    assert others.calls == ["sum of torch.float32"]


@pytest.mark.parametrize(("counts", "calls"), [([3, 4], []), ([0, 1], []), ([9, 9], ["rows"])])
def test_rows_are_gathered_by_packets_if_each_rank_has_few(
    group: PacketCommunicator, others: Others, counts: list[int], calls: list[str]
) -> None:
    x_TH = rows(counts[1])
    expected = torch.cat([x_TH[:count] for count in counts])
    assert torch.equal(group.all_gather_rows(x_TH, counts), expected)
    assert others.calls == calls
    assert group.all_gather_rows(x_TH[:0], [0, 0]).shape == (0, HIDDEN)
    assert others.calls == calls


def test_columns_are_gathered_on_the_first_rank() -> None:
    domain = Domain()
    domain.shard = SimpleNamespace(rank=2)
    first = PacketCommunicator(Others(rank=0), domain, range(2, 4))  # type: ignore[arg-type]
    x_TH = rows(2, torch.float32, 32)
    gathered = first.gather_columns(x_TH)
    assert gathered is not None
    assert torch.equal(gathered, torch.cat([x_TH, x_TH], dim=1))


def test_the_others_get_no_columns(group: PacketCommunicator, others: Others) -> None:
    assert group.gather_columns(rows(2)) is None
    assert others.calls == []
    assert group.gather_columns(rows(2, torch.float32, 512)) is None
    assert others.calls == ["columns"]


def test_little_is_broadcast_by_packets(group: PacketCommunicator, others: Others) -> None:
    tokens = torch.zeros(5, dtype=torch.int64)
    assert group.broadcast(tokens) is tokens
    assert tokens.eq(7).all()
    assert others.calls == []
    for x in (torch.zeros(0), torch.zeros(3, dtype=torch.int8), torch.zeros(999), rows(6)[:, 0]):
        assert group.broadcast(x) is x
    assert others.calls == 4 * ["broadcast"]


def test_the_larger_the_group_the_fewer_rows_go_by_packets() -> None:
    assert rows_by_packets(1, 8192) == 0
    assert [rows_by_packets(size, 8192) for size in (2, 4, 8, 128)] == [256, 85, 36, 2]
    assert rows_by_packets(2, 4 << 20) == 1


def test_few_tokens_do_not_travel_where_every_rank_has_them() -> None:
    class Both(Domain):
        shard = SimpleNamespace(rank=1)

    config = ExchangeConfig(exchange="nvlink")
    for tp, limit in ((4, 6), (2, 0)):
        layout = RankLayout(1, tp, 4 // tp)
        groups = ParallelGroups(layout, Communicator(1, 0), Communicator(1, 0))
        selector = ExchangeSelector(config, groups, 8, Both())  # type: ignore[arg-type]
        for num_tokens in range(17):
            chosen = selector.select(num_tokens)
            expected: Any = ReplicatedExchange if num_tokens <= limit and limit else NvlinkExchange
            assert type(chosen) is expected, (tp, num_tokens)
