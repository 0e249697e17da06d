"""Summing each row's expert outputs, alone and with the residual and the norm.

Legend: R rows, K experts per row, P = R * K pairs, H hidden size.
"""

from __future__ import annotations

import pytest
import torch

from moe_engine.ops import moe, norm
from moe_engine.ops.reference import moe as reference
from tests.kernels.triton_device import DEVICE, INTERPRETED, needs_gpu, needs_triton

# (R, K, H): nothing, one, one choice, a row longer than a block, the widest choice.
SHAPES = [(0, 8, 64), (1, 8, 1), (3, 1, 100), (5, 8, 1500), (2, 32, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Half a unit in the last place, more where terms cancel; Triton's interpreter cuts off to bfloat16
# where a GPU rounds.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 2e-2 if INTERPRETED else 8e-3,
}
EPS = 1e-6


def inputs(
    num_rows: int, top_k: int, hidden: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs with NaN where no expert wrote, the ids that say so, and weights."""
    ids_RK = torch.randint(-1, 4, (num_rows, top_k), dtype=torch.int32, device=DEVICE)
    y_PH = torch.randn(num_rows * top_k, hidden, device=DEVICE).to(dtype)
    y_PH[ids_RK.flatten() < 0] = float("nan")
    return y_PH, ids_RK, torch.rand(num_rows, top_k, device=DEVICE)


def expected_sum(
    y_PH: torch.Tensor, ids_RK: torch.Tensor, weights_RK: torch.Tensor
) -> torch.Tensor:
    """In float64."""
    exists_P1 = (ids_RK >= 0).flatten()[:, None]
    y_PH = torch.where(exists_P1, y_PH.double() * weights_RK.flatten()[:, None].double(), 0.0)
    return y_PH.view(*ids_RK.shape, y_PH.shape[1]).sum(1)


@pytest.fixture(params=["eager", "lazy"])
def either_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test reading outputs before, and after, it is known that they exist."""
    from moe_engine.kernels import combine

    monkeypatch.setattr(combine, "EAGER_MAX_ROWS", 2**31 if request.param == "eager" else -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_leaves_out_what_no_expert_wrote(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    y_PH, ids_RK, weights_RK = (tensor.cpu() for tensor in inputs(*shape, dtype))
    summed = reference.sum_choices(y_PH, ids_RK, weights_RK)
    assert summed.dtype == dtype
    expected = expected_sum(y_PH, ids_RK, weights_RK)
    torch.testing.assert_close(summed.double(), expected, rtol=8e-3, atol=1e-5)


@needs_triton
@pytest.mark.usefixtures("poisoned", "either_order")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_matches_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    from moe_engine.kernels import combine

    y_PH, ids_RK, weights_RK = inputs(*shape, dtype)
    summed = combine.sum_choices(y_PH, ids_RK, weights_RK)
    assert summed.dtype == dtype
    tolerance = TOLERANCE[dtype]
    expected = expected_sum(y_PH, ids_RK, weights_RK)
    torch.testing.assert_close(summed.double(), expected, rtol=tolerance, atol=tolerance)


@needs_triton
@pytest.mark.usefixtures("poisoned", "either_order")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_norm_matches_sum_then_norm(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    from moe_engine.kernels import combine

    y_PH, ids_RK, weights_RK = inputs(*shape, dtype)
    num_rows, _, hidden = shape
    residual_RH = torch.randn(num_rows, 2 * hidden, device=DEVICE).to(dtype)[:, hidden:]
    weight_H = torch.randn(hidden, device=DEVICE).to(dtype)
    normed, new_residual = combine.sum_add_rms_norm(
        y_PH, ids_RK, weights_RK, residual_RH, weight_H, EPS
    )
    summed = combine.sum_choices(y_PH, ids_RK, weights_RK)
    expected, expected_residual = norm.add_rms_norm(summed, residual_RH, weight_H, EPS)
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(new_residual, expected_residual, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(normed, expected, rtol=tolerance, atol=tolerance)
    if not INTERPRETED:
        assert torch.equal(new_residual, expected_residual)


def test_cpu_operators_agree_with_the_references() -> None:
    y_PH, ids_RK, weights_RK = (tensor.cpu() for tensor in inputs(6, 4, 32, torch.float32))
    residual_RH, weight_H = torch.randn(6, 32), torch.randn(32)
    summed = moe.sum_choices(y_PH, ids_RK, weights_RK)
    assert torch.equal(summed, reference.sum_choices(y_PH, ids_RK, weights_RK))
    outputs = moe.ExpertOutputs(y_PH, ids_RK, weights_RK)
    fused = moe.sum_add_rms_norm(outputs, residual_RH, weight_H, EPS)
    expected = norm.add_rms_norm(summed, residual_RH, weight_H, EPS)
    assert all(torch.equal(a, b) for a, b in zip(fused, expected, strict=True))


@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_rows", [1, 64, 257, 8192])
def test_real_sizes_and_independence_of_the_batch(num_rows: int) -> None:
    y_PH, ids_RK, weights_RK = inputs(num_rows, 8, 2048, torch.bfloat16)
    residual_RH = torch.randn(num_rows, 2048, device=DEVICE).bfloat16()
    weight_H = torch.randn(2048, device=DEVICE).bfloat16()
    summed = moe.sum_choices(y_PH, ids_RK, weights_RK)
    expected = expected_sum(y_PH, ids_RK, weights_RK)
    torch.testing.assert_close(summed.double(), expected, rtol=8e-3, atol=8e-3)
    outputs = moe.ExpertOutputs(y_PH, ids_RK, weights_RK)
    fused = moe.sum_add_rms_norm(outputs, residual_RH, weight_H, EPS)
    last = slice(num_rows - 1, num_rows)
    alone = (y_PH[-8:], ids_RK[last], weights_RK[last])
    assert torch.equal(moe.sum_choices(*alone), summed[last])
    fused_alone = moe.sum_add_rms_norm(moe.ExpertOutputs(*alone), residual_RH[last], weight_H, EPS)
    assert all(torch.equal(a, b[last]) for a, b in zip(fused_alone, fused, strict=True))


@needs_gpu
def test_row_offsets_pass_two_to_the_31() -> None:
    num_rows = 140_000
    y_PH = torch.randn(num_rows * 8, 2048, device=DEVICE, dtype=torch.bfloat16)
    assert y_PH.numel() > 2**31
    ids_RK = torch.zeros(num_rows, 8, dtype=torch.int32, device=DEVICE)
    weights_RK = torch.rand(num_rows, 8, device=DEVICE)
    summed = moe.sum_choices(y_PH, ids_RK, weights_RK)[-3:]
    expected = expected_sum(y_PH[-24:], ids_RK[-3:], weights_RK[-3:])
    torch.testing.assert_close(summed.double(), expected, rtol=8e-3, atol=8e-3)
