"""RMSNorm: the reference against Hugging Face's, the Triton kernel against the reference.

On a machine without a GPU, the kernel runs in Triton's interpreter.

Legend: T tokens, H the normalised size.
"""

from __future__ import annotations

import pytest
import torch

from moe_engine.ops import norm
from moe_engine.ops.linear import SplitSums
from moe_engine.ops.reference import norm as reference
from tests.kernels.triton_device import DEVICE, INTERPRETED, needs_gpu, needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Nothing, one, odd, a head, a hidden size that is no power of two, a row longer than a tile, heads.
SHAPES = [(0, 64), (1, 1), (3, 7), (37, 128), (5, 1536), (2, 4096), (3, 5, 128), (64,)]
EPS = 1e-6
# A few units in the last place: the sum of squares is added up in another order. Triton's
# interpreter cuts float32 off to bfloat16 where a GPU rounds, once for each of three results.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 3e-2 if INTERPRETED else 1e-2,
    torch.float16: 1.5e-3,
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x = (torch.randn(shape) * 3).to(dtype)
    residual = torch.randn(shape).to(dtype)
    weight_H = (1 + 0.3 * torch.randn(shape[-1])).to(dtype)
    return x, residual, weight_H


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_bitwise_the_hugging_face_norm(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    x, residual, weight_H = inputs(shape, dtype)
    theirs = Qwen3MoeRMSNorm(shape[-1], eps=EPS).to(dtype)
    theirs.weight.data = weight_H
    with torch.no_grad():
        assert torch.equal(reference.rms_norm(x, weight_H, EPS), theirs(x))
        normed, new_residual = reference.add_rms_norm(x, residual, weight_H, EPS)
        assert torch.equal(new_residual, residual + x)
        assert torch.equal(normed, theirs(residual + x))


def test_cpu_tensors_take_the_reference() -> None:
    x, residual, weight_H = inputs((5, 64), torch.bfloat16)
    assert torch.equal(norm.rms_norm(x, weight_H, EPS), reference.rms_norm(x, weight_H, EPS))
    ours = norm.add_rms_norm(x, residual, weight_H, EPS)
    expected = reference.add_rms_norm(x, residual, weight_H, EPS)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_rms_norm_matches_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from moe_engine.kernels import rms_norm as kernels

    x, _, weight_H = (tensor.to(DEVICE) for tensor in inputs(shape, dtype))
    before = x.clone()
    out = kernels.rms_norm(x, weight_H, EPS)
    expected = reference.rms_norm(x, weight_H, EPS)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(x, before)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_add_rms_norm_matches_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    from moe_engine.kernels import rms_norm as kernels

    x, residual, weight_H = (tensor.to(DEVICE) for tensor in inputs(shape, dtype))
    out, new_residual = kernels.add_rms_norm(x, residual, weight_H, EPS)
    expected, expected_residual = reference.add_rms_norm(x, residual, weight_H, EPS)
    one_cut = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(new_residual, expected_residual, rtol=one_cut, atol=0)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (4, 3, 64), (8, 5, 1536)])
def test_triton_sums_parts_before_it_adds(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from moe_engine.kernels import rms_norm as kernels

    _, residual, weight_H = (tensor.to(DEVICE) for tensor in inputs(shape[1:], dtype))
    sums = SplitSums(torch.randn(shape, device=DEVICE), dtype)
    out, new_residual = kernels.split_add_rms_norm(sums.parts_STO, residual, weight_H, EPS)
    expected, expected_residual = reference.add_rms_norm(sums.summed(), residual, weight_H, EPS)
    # The sum of the parts is cut off as well, where the reference rounds it.
    tolerance = TOLERANCE[dtype] * (2 if INTERPRETED else 1)
    torch.testing.assert_close(new_residual, expected_residual, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_the_operator_adds_a_sum_that_is_still_to_be_taken() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, residual, weight_H = (tensor.to(device) for tensor in inputs((3, 64), torch.float32))
    sums = SplitSums(torch.randn(4, 3, 64, device=device), torch.float32)
    ours = norm.split_add_rms_norm(sums, residual, weight_H, EPS)
    expected = reference.add_rms_norm(sums.parts_STO.sum(0), residual, weight_H, EPS)
    torch.testing.assert_close(ours, expected)


@needs_triton
def test_triton_reads_a_slice_of_wider_rows() -> None:
    from moe_engine.kernels import rms_norm as kernels

    wide, residual, weight_H = (tensor.to(DEVICE) for tensor in inputs((9, 64), torch.float32))
    x, weight_H = wide[:, 16:48], weight_H[16:48]
    out, _ = kernels.add_rms_norm(x, residual[:, 32:], weight_H, EPS)
    expected, _ = reference.add_rms_norm(x, residual[:, 32:], weight_H, EPS)
    torch.testing.assert_close(out, expected)


@needs_triton
def test_triton_row_offsets_pass_two_to_the_31() -> None:
    """Rows 2^30 elements apart in memory that is reserved, but of which little is touched."""
    from moe_engine.kernels import rms_norm as kernels

    row_stride, num_columns = 2**30, 8
    storage = torch.empty(2 * row_stride + num_columns, dtype=torch.bfloat16, device=DEVICE)
    x_TH = storage.as_strided((3, num_columns), (row_stride, 1))
    x_TH.copy_(torch.randn(3, num_columns))
    weight_H = torch.ones(num_columns, dtype=torch.bfloat16, device=DEVICE)
    out = kernels.rms_norm(x_TH, weight_H, EPS)
    expected = reference.rms_norm(x_TH, weight_H, EPS)
    torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)


@needs_gpu
def test_cuda_tensors_take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_engine.kernels import rms_norm as kernels

    calls: list[str] = []
    monkeypatch.setattr(kernels, "rms_norm", lambda *args: calls.append("rms_norm"))
    norm.rms_norm(torch.ones(2, 8, device="cuda"), torch.ones(8, device="cuda"), EPS)
    assert calls == ["rms_norm"]


@pytest.mark.parametrize(
    ("x", "weight_H", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(4), "x_TH is torch.int64"),
        (torch.zeros(()), torch.zeros(1), r"it must be \[..., H\]"),
        (torch.zeros(2, 0), torch.zeros(0), "H >= 1"),
        (torch.zeros(2, 4), torch.zeros(5), r"weight_H is torch.float32 \[5\]"),
        (torch.zeros(2, 4), torch.zeros(4).half(), "same dtype"),
    ],
)
def test_wrong_arguments_are_refused(x: torch.Tensor, weight_H: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm.rms_norm(x, weight_H, EPS)


@pytest.mark.parametrize("residual", [torch.zeros(3, 4), torch.zeros(2, 4).half()])
def test_a_residual_unlike_the_input_is_refused(residual: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="residual_TH is"):
        norm.add_rms_norm(torch.zeros(2, 4), residual, torch.zeros(4), EPS)
