"""The Triton fill against the reference, bit for bit.

On a machine without a GPU, the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from moe_engine.ops import fill as ops
from moe_engine.ops.fill import HashedFill, fill_hashed
from tests.kernels.triton_device import DEVICE, INTERPRETED, needs_gpu, needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, vectors, rows narrower and wider than a tile, an odd matrix, many short rows.
SHAPES = [(1,), (1025,), (1, 1), (3, 7), (2, 2500), (37, 128), (600, 3)]
STD = 0.02


def expected(shape: tuple[int, ...], dtype: torch.dtype, key: int, starts: tuple[int, ...]):
    """The reference's values; Triton's interpreter cuts float32 off to bfloat16."""
    if INTERPRETED and dtype == torch.bfloat16:
        exact = torch.empty(shape)
        fill_hashed([HashedFill(exact, key, starts)], STD)
        bits = exact.view(torch.int32) & -65536
        return bits.view(torch.float32).to(dtype)
    values = torch.empty(shape, dtype=dtype)
    fill_hashed([HashedFill(values, key, starts)], STD)
    return values


def launch(fills: list[HashedFill]) -> None:
    scale = 3**0.5 * STD / (1 << 23)
    ops._fill_alike(fills, scale)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_fills_what_the_reference_fills(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fills = [
        HashedFill(torch.full(shape, 9.0, dtype=dtype, device=DEVICE), key, starts)
        for key, starts in [
            (0, (0,) * len(shape)),
            (-(1 << 63), tuple(range(5, 5 + len(shape)))),
            ((1 << 63) - 1, (1 << 20,) * len(shape)),
        ]
    ]
    launch(fills)
    for fill in fills:
        assert torch.equal(fill.target.cpu(), expected(shape, dtype, fill.key, fill.starts))


@needs_triton
def test_triton_writes_nothing_beside_a_slice_of_wider_rows() -> None:
    wide = torch.full((2, 9, 64), 7.0, device=DEVICE)
    fills = [HashedFill(wide[i, 2:7, 16:48], key=i, starts=(3, 4)) for i in range(2)]
    launch(fills)
    for i in range(2):
        values = expected((5, 32), torch.float32, i, (3, 4))
        around = torch.full((9, 64), 7.0)
        around[2:7, 16:48] = values
        assert torch.equal(wide[i].cpu(), around)


@needs_triton
def test_triton_takes_more_tensors_than_a_grid_has_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_engine.kernels import hash_fill as kernels

    monkeypatch.setattr(kernels, "MAX_GRID_Y", 2)
    fills = [HashedFill(torch.zeros(4, device=DEVICE), key, (0,)) for key in range(5)]
    launch(fills)
    for fill in fills:
        assert torch.equal(fill.target.cpu(), expected((4,), torch.float32, fill.key, (0,)))


@needs_triton
def test_triton_row_offsets_pass_two_to_the_31() -> None:
    """Rows 2^30 elements apart in memory that is reserved, but of which little is touched."""
    row_stride, num_columns = 2**30, 8
    storage = torch.empty(2 * row_stride + num_columns, dtype=torch.float16, device=DEVICE)
    target = storage.as_strided((3, num_columns), (row_stride, 1))
    launch([HashedFill(target, 11, (0, 0))])
    assert torch.equal(target.cpu(), expected((3, num_columns), torch.float16, 11, (0, 0)))


@needs_gpu
def test_on_a_gpu_tensors_of_one_shape_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_engine.kernels import hash_fill as kernels

    calls: list[int] = []
    monkeypatch.setattr(kernels, "hash_fill", lambda table, *_, **__: calls.append(len(table)))
    matrices = [torch.empty(4, 8, device="cuda") for _ in range(5)]
    vectors = [torch.empty(8, device="cuda") for _ in range(3)]
    fills = [HashedFill(t, 0, (0,) * t.dim()) for t in [*matrices, *vectors]]
    fill_hashed(fills, STD)
    assert calls == [5, 3]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_draws_the_model_that_a_cpu_draws(dtype: torch.dtype) -> None:
    for shape in [(0, 4), (77,), (130, 2048), (3, 5, 7)]:
        ours, theirs = (torch.zeros(shape, dtype=dtype, device=d) for d in ("cuda", "cpu"))
        for target in (ours, theirs):
            fill_hashed([HashedFill(target, 5, (1,) * len(shape))], STD)
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize(
    ("target", "starts"),
    [
        (torch.zeros(2, dtype=torch.int64), (0,)),
        (torch.zeros(2, 3), (0,)),
        (torch.zeros(()), ()),
    ],
)
def test_wrong_targets_are_refused(target: torch.Tensor, starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one start for each dimension"):
        fill_hashed([HashedFill(target, 0, starts)], STD)
