"""The embedding: kernel, operator and reference against ``F.embedding`` and zeros.

Legend: T tokens, H hidden size, P rows of the shard.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_engine.ops.embedding import embedding
from tests.kernels.triton_device import DEVICE, needs_gpu, needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (T, H): nothing, one of one, odd ones, a block and its neighbours, several blocks.
SHAPES = [(0, 8), (1, 1), (3, 7), (5, 1023), (2, 1024), (7, 1025), (4, 2500)]


def run(*args: object) -> torch.Tensor:
    from moe_engine.kernels import embedding as kernels

    return kernels.embedding(*args)


def expected_rows(ids_T: torch.Tensor, weight_VH: torch.Tensor, first: int, last: int):
    """What a shard of the whole table's rows from ``first`` to ``last - 1`` gives."""
    is_here_T = (ids_T >= first) & (ids_T < last)
    return torch.where(is_here_T[:, None], F.embedding(ids_T, weight_VH), 0)


def check(found_TH: torch.Tensor, expected_TH: torch.Tensor) -> None:
    assert found_TH.dtype == expected_TH.dtype
    assert found_TH.is_contiguous()
    assert torch.equal(found_TH.cpu(), expected_TH)


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_the_whole_table(shape: tuple[int, int], dtype: torch.dtype) -> None:
    (num_tokens, num_columns), vocab_size = shape, 37
    weight_VH = torch.randn(vocab_size, num_columns).to(dtype)
    ids_T = torch.randint(vocab_size, (num_tokens,))
    ids_T[:2] = torch.tensor([vocab_size - 1, 0])[:num_tokens]
    expected_TH = F.embedding(ids_T, weight_VH)
    check(run(ids_T.to(DEVICE), weight_VH.to(DEVICE), 0, vocab_size), expected_TH)
    check(embedding(ids_T, weight_VH, 0, vocab_size), expected_TH)


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("first", "last"), [(0, 13), (13, 26), (26, 37), (37, 37)])
def test_ids_of_other_shards_give_zeros(first: int, last: int) -> None:
    """Of a rank's 13 rows the last ones may be unused, and hold anything."""
    weight_VH = torch.randn(37, 50)
    weight_PH = torch.full((13, 50), torch.nan)
    weight_PH[: last - first] = weight_VH[first:last]
    ids_T = torch.randperm(37)
    expected_TH = expected_rows(ids_T, weight_VH, first, last)
    check(run(ids_T.to(DEVICE), weight_PH.to(DEVICE), first, last), expected_TH)
    check(embedding(ids_T, weight_PH, first, last), expected_TH)


@needs_triton
def test_shards_add_up_to_the_table() -> None:
    weight_VH, ids_T = torch.randn(30, 20), torch.randint(30, (11,))
    parts = [
        run(ids_T.to(DEVICE), weight_VH[first : first + 10].to(DEVICE), first, first + 10)
        for first in (0, 10, 20)
    ]
    check(sum(parts), F.embedding(ids_T, weight_VH))


@needs_triton
def test_ids_may_begin_anywhere_and_rows_may_be_parts_of_wider_ones() -> None:
    weight_VX, ids_X = torch.randn(9, 40), torch.randint(9, (8,))
    found_TH = run(ids_X.to(DEVICE)[3:], weight_VX.to(DEVICE)[:, 5:25], 0, 9)
    check(found_TH, F.embedding(ids_X[3:], weight_VX[:, 5:25]))


@needs_gpu
def test_row_offsets_pass_two_to_the_31() -> None:
    num_rows, num_columns = 2**20 + 5, 2048
    weight_VH = torch.zeros(num_rows, num_columns, dtype=torch.bfloat16, device=DEVICE)
    assert weight_VH.numel() > 2**31
    weight_VH[-1].normal_()
    ids_T = torch.tensor([num_rows - 1, 0], device=DEVICE)
    check(embedding(ids_T, weight_VH, 0, num_rows), F.embedding(ids_T, weight_VH).cpu())


@needs_gpu
def test_a_graph_replays_with_other_ids() -> None:
    weight_VH = torch.randn(1000, 2048, device=DEVICE, dtype=torch.bfloat16)
    ids_T = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    embedding(ids_T, weight_VH, 0, 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found_TH = embedding(ids_T, weight_VH, 0, 1000)
    for _ in range(3):
        ids_T.copy_(torch.randint(1000, (64,)))
        graph.replay()
        check(found_TH, F.embedding(ids_T, weight_VH).cpu())
