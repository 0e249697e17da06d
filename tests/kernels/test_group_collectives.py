"""Collectives of groups by packets, of virtual ranks on one GPU: bits, graphs, who stalls."""

from __future__ import annotations

import pytest
import torch

from moe_engine.errors import ExchangeTimeout
from tests.kernels.exchange_work import (
    choose,
    expected_outputs,
    random_tokens,
    scaling_experts,
    shape_of,
)
from tests.kernels.virtual_ranks import VirtualRanks

pytestmark = pytest.mark.usefixtures("needs_hopper")

MAX_ROWS = 64


def sums(parts: list[torch.Tensor]) -> torch.Tensor:
    """In float32, in the order of the ranks, rounded once."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total.to(parts[0].dtype)


def all_reduce(world: VirtualRanks, parts: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    """Of groups of so many ranks."""
    torch.cuda.synchronize()
    outputs = []
    for rank, (domain, stream, x_TH) in enumerate(
        zip(world.domains, world.streams, parts, strict=True)
    ):
        first = rank // size * size
        with torch.cuda.stream(stream):
            outputs.append(domain.all_reduce(x_TH, range(first, first + size)))
    return outputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [8, 16, 2048, 2880, 4096])
@pytest.mark.parametrize(("num_ranks", "size"), [(1, 1), (2, 2), (5, 5), (8, 8), (8, 4), (6, 2)])
def test_every_rank_gets_the_same_sum(
    num_ranks: int, size: int, hidden: int, dtype: torch.dtype
) -> None:
    shape = shape_of(num_ranks, dtype, hidden=hidden, max_tokens=1, reduced_rows=MAX_ROWS)
    world = VirtualRanks(shape)
    for num_rows in (1, 2, 7, 33, MAX_ROWS, 1, 1):
        parts = [torch.randn(num_rows, hidden, device="cuda").to(dtype) for _ in range(num_ranks)]
        outputs = all_reduce(world, parts, size)
        world.finish()
        for rank, out_TH in enumerate(outputs):
            first = rank // size * size
            assert torch.equal(out_TH, sums(parts[first : first + size]))


@pytest.mark.parametrize(("num_ranks", "size"), [(1, 1), (2, 2), (5, 5), (8, 8), (8, 4)])
def test_every_rank_gets_what_all_bring(num_ranks: int, size: int) -> None:
    shape = shape_of(num_ranks, hidden=256, max_tokens=1, reduced_rows=MAX_ROWS)
    world = VirtualRanks(shape)
    most = MAX_ROWS * shape.row_bytes // 4
    for most_words in (1, 7, 96, 97, 1000, most):
        counts = torch.randint(0, most_words + 1, (num_ranks,)).tolist()
        counts[-1] = most_words
        counts[0] = 0 if num_ranks > 1 else most_words
        parts = [torch.randint(-(2**31), 2**31, (n,), device="cuda").int() for n in counts]
        torch.cuda.synchronize()
        outputs = []
        for rank, (domain, stream) in enumerate(zip(world.domains, world.streams, strict=True)):
            group = range(rank // size * size, rank // size * size + size)
            with torch.cuda.stream(stream):
                out = torch.empty(sum(counts[i] for i in group), dtype=torch.int32, device="cuda")
                num_bytes = [4 * counts[i] for i in group]
                outputs.append(domain.all_gather(parts[rank], out, num_bytes, group))
        world.finish()
        for rank, out in enumerate(outputs):
            first = rank // size * size
            assert torch.equal(out, torch.cat(parts[first : first + size]))


def test_what_one_rank_brings_may_take_the_place_of_what_others_have() -> None:
    shape = shape_of(3, max_tokens=1, reduced_rows=4)
    world = VirtualRanks(shape)
    for number in range(20):  # the ranks that only receive must not fall behind
        parts = [torch.full((201,), 3 * number + rank, device="cuda") for rank in range(3)]
        torch.cuda.synchronize()
        for domain, stream, x in zip(world.domains, world.streams, parts, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(5):
                    assert domain.all_gather(x, x, [x.nbytes, 0, 0], range(3)) is x
        world.finish()
        for x in parts:
            assert x.eq(3 * number).all()


@pytest.mark.parametrize("num_bytes", [[8 << 20, 4], [4, 6], [-4, 4]])
def test_what_cannot_be_gathered_is_refused(num_bytes: list[int]) -> None:
    world = VirtualRanks(shape_of(2, max_tokens=1, reduced_rows=4))
    domain, x = world.domains[0], torch.zeros(8, device="cuda")
    with pytest.raises(ValueError, match=r"num_bytes is .*; it is a multiple of 4 up to 2048"):
        domain.library.exchange_all_gather(
            domain.state,
            x=x.data_ptr(),
            out=x.data_ptr(),
            num_bytes=num_bytes,
            first_rank=0,
            stream=world.streams[0].cuda_stream,
        )


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_many_in_a_row_and_exchanges_between_them(num_ranks: int) -> None:
    """Nothing is waited for by the host; what is written too early would be summed."""
    shape = shape_of(num_ranks, torch.float32, max_tokens=8, reduced_rows=8)
    world = VirtualRanks(shape)
    factors_E = torch.randint(1, 5, (shape.num_experts,), device="cuda").float()
    experts = [scaling_experts(shape, rank, factors_E) for rank in range(num_ranks)]
    ranks = [
        random_tokens(shape, 8, lambda n: choose(shape, "uniform", n)) for _ in range(num_ranks)
    ]
    graphs, outputs = world.capture(ranks, 8, experts)
    parts = [torch.randint(-9, 10, (8, shape.hidden), device="cuda").float() for _ in ranks]
    group = range(num_ranks)
    rounds = 500
    kept, reducing = [], []
    for domain, stream, x_TH in zip(world.domains, world.streams, parts, strict=True):
        graph = torch.cuda.CUDAGraph()
        total_TH = torch.zeros_like(x_TH)
        num_wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            total_TH += domain.all_reduce(domain.all_reduce(x_TH, group), group)
            own = total_TH[:1].contiguous()
            all_NH = own.new_empty(num_ranks, shape.hidden)
            domain.all_gather(own, all_NH, [own.nbytes] * num_ranks, group)
            num_wrong += (all_NH != own).sum()  # all have the same
        kept.append((total_TH, num_wrong))
        reducing.append(graph)
    torch.cuda.synchronize()
    for number in range(rounds):
        world.replay(reducing)
        if number % 7 == 0:
            world.replay(graphs)
    world.finish()
    expected = sums(parts) * num_ranks * rounds
    for total_TH, num_wrong in kept:
        assert torch.equal(total_TH, expected)
        assert int(num_wrong) == 0
    _, right = expected_outputs(shape, ranks, 8, experts)
    for out_TH, right_TH in zip(outputs, right, strict=True):
        assert torch.equal(out_TH, right_TH)


def test_in_place() -> None:
    shape = shape_of(3, max_tokens=1, reduced_rows=4)
    world = VirtualRanks(shape)
    parts = [torch.randn(4, shape.hidden, device="cuda").to(shape.dtype) for _ in range(3)]
    expected = sums(parts)
    torch.cuda.synchronize()
    for domain, stream, x_TH in zip(world.domains, world.streams, parts, strict=True):
        domain.library.exchange_all_reduce(
            domain.state,
            x=x_TH.data_ptr(),
            out=x_TH.data_ptr(),
            num_rows=4,
            first_rank=0,
            group_size=3,
            stream=stream.cuda_stream,
        )
    world.finish()
    for x_TH in parts:
        assert torch.equal(x_TH, expected)


def test_a_rank_that_stalls_is_named() -> None:
    shape = shape_of(3, max_tokens=1, reduced_rows=4)
    world = VirtualRanks(shape, timeout=0.2)
    parts = [torch.randn(4, shape.hidden, device="cuda").to(shape.dtype) for _ in range(3)]
    torch.cuda.synchronize()
    for rank in (0, 2):
        with torch.cuda.stream(world.streams[rank]):
            world.domains[rank].all_reduce(parts[rank], range(3))
    torch.cuda.synchronize()
    for rank in (0, 2):
        with pytest.raises(ExchangeTimeout, match=r"rank 1 has sent nothing .* all-reduce"):
            world.domains[rank].check()
    for domain in world.domains:
        domain.reset()
    outputs = all_reduce(world, parts, 3)
    world.finish()
    for out_TH in outputs:
        assert torch.equal(out_TH, sums(parts))


def test_more_rows_than_the_buffer_holds_are_refused() -> None:
    world = VirtualRanks(shape_of(2, max_tokens=1, reduced_rows=4))
    x_TH = torch.zeros(5, world.shape.hidden, device="cuda", dtype=world.shape.dtype)
    with pytest.raises(ValueError, match="num_rows is 5; it is from 1 to 4"):
        world.domains[0].all_reduce(x_TH, range(2))
