"""Sorting pairs by expert: the kernel and the operator against a loop in Python.

Legend: R rows, K experts per row, P pairs, E experts.
"""

from __future__ import annotations

import pytest
import torch

from moe_engine.ops.moe import group_by_expert
from tests.kernels.triton_device import DEVICE, needs_gpu, needs_triton

# (P, E): nothing, one, a block and one more, each shape of the one launch, the two launches
# with chunks of one block, of two and of four, at most 128 of them, and more.
SIZES = [
    (0, 3),
    (1, 1),
    (8, 16),
    (128, 3),
    (129, 3),
    (512, 5),
    (513, 5),
    (4096, 5),
    (4097, 3),
    (16_384, 128),
    (16_385, 128),
    (40_000, 2),
    (65_536, 128),
    (65_537, 100),
]


def run(ids_P: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    from moe_engine.kernels import expert_grouping

    return expert_grouping.group_by_expert(ids_P.to(DEVICE), num_experts)


def check(ids_P: torch.Tensor, num_experts: int, result: tuple[torch.Tensor, ...]) -> None:
    offsets_E1, pairs_P = (tensor.cpu() for tensor in result)
    assert offsets_E1.dtype == pairs_P.dtype == torch.int32
    assert pairs_P.shape == ids_P.shape
    pairs_of = [(ids_P == expert).nonzero().flatten() for expert in range(num_experts)]
    starts = torch.tensor([0, *(len(pairs) for pairs in pairs_of)]).cumsum(0)
    assert offsets_E1.tolist() == starts.tolist()
    assert torch.equal(pairs_P[: starts[-1]].long(), torch.cat(pairs_of))


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", SIZES)
def test_pairs_are_sorted_and_ids_below_zero_left_out(size: tuple[int, int]) -> None:
    num_pairs, num_experts = size
    ids_P = torch.randint(-2, num_experts, (num_pairs,), dtype=torch.int32)
    check(ids_P, num_experts, run(ids_P, num_experts))


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("expert", [-1, 0, 6])
@pytest.mark.parametrize("num_pairs", [40, 700, 5000])
def test_all_pairs_may_go_to_one_expert_or_none(num_pairs: int, expert: int) -> None:
    ids_P = torch.full((num_pairs,), expert, dtype=torch.int32)
    check(ids_P, 7, run(ids_P, 7))


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("share", [0.5, 0.99])
@pytest.mark.parametrize("num_pairs", [4097, 33_001])
def test_an_expert_may_be_popular(num_pairs: int, share: float) -> None:
    """Ranks go on from step to step of a chunk, and from chunk to chunk."""
    ids_P = torch.randint(-1, 60, (num_pairs,), dtype=torch.int32)
    ids_P[torch.rand(num_pairs) < share] = 17
    check(ids_P, 60, run(ids_P, 60))


@needs_triton
@pytest.mark.parametrize("num_pairs", [4097, 65_536, 65_537, 524_288, 1 << 24])
def test_chunks_are_no_more_than_a_program_reads_well(
    monkeypatch: pytest.MonkeyPatch, num_pairs: int
) -> None:
    from moe_engine.kernels import expert_grouping

    launched: list[tuple[int, int]] = []
    monkeypatch.setattr(
        expert_grouping,
        "launch_kernel",
        lambda kernel, grid, *_, **options: launched.append(
            (grid[0], options.get("CHUNK") or options["NUM_STEPS"] * options["BLOCK"])
        ),
    )
    run(torch.empty(num_pairs, dtype=torch.int32), 128)
    count, place = launched
    assert count == place
    num_chunks, chunk = count
    assert num_chunks <= (128 if num_pairs <= 65_536 else 256)
    assert (num_chunks - 1) * chunk < num_pairs <= num_chunks * chunk


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_operator_numbers_pairs_by_row_and_choice(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids_RK = torch.tensor([[2, 0], [-1, 2], [1, 0]], dtype=dtype, device=device)
    groups = group_by_expert(ids_RK, 4)
    assert groups.offsets_E1.tolist() == [0, 2, 3, 5, 5]
    assert groups.pairs_P[:5].tolist() == [1, 5, 4, 0, 3]


@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_experts", [1, 100, 128, 512])
@pytest.mark.parametrize(
    "num_pairs", [8, 56, 512, 2048, 4096, 8192, 32_768, 65_536, 65_530, 65_537, 524_288]
)
def test_real_sizes(num_pairs: int, num_experts: int) -> None:
    ids_P = torch.randint(-1, num_experts, (num_pairs,), dtype=torch.int32)
    check(ids_P, num_experts, run(ids_P, num_experts))


@needs_gpu
@pytest.mark.parametrize("num_rows", [64, 2048])
def test_a_graph_replays_with_other_ids(num_rows: int) -> None:
    ids_RK = torch.randint(-1, 128, (num_rows, 8), dtype=torch.int32, device=DEVICE)
    group_by_expert(ids_RK, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        groups = group_by_expert(ids_RK, 128)
    for low in (-1, 100, -300):
        fresh_RK = torch.randint(low, 128, (num_rows, 8), dtype=torch.int32)
        ids_RK.copy_(fresh_RK)
        graph.replay()
        check(fresh_RK.flatten(), 128, (groups.offsets_E1, groups.pairs_P))
