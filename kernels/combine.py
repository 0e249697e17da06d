"""Weighted sums of the experts' outputs, alone or with the residual and the norm that follow.

Legend: R rows, K experts per row, P = R * K pairs in the order (row, choice), H hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import launch_kernel, supports_pdl

# Up to this many rows a pair is read before it is known whether it exists, to wait only once.
EAGER_MAX_ROWS = 256
# Columns that a program of the plain sum takes, and columns that a warp of the fused one takes.
SUM_BLOCK_H = 512
NORM_COLUMNS_PER_WARP = 256


@triton.jit
def _sum_of_choices(
    y_ptr,
    ids_ptr,
    weights_ptr,
    row,
    columns_H,
    mask_H,
    hidden,
    TOP_K: tl.constexpr,
    EAGER: tl.constexpr,
):
    """Float32 sum of a row's TOP_K weighted pairs in order of choice; ids below 0 left out."""
    total_H = tl.zeros(columns_H.shape, tl.float32)
    for k in tl.static_range(TOP_K):
        pair = row * TOP_K + k
        exists = tl.load(ids_ptr + pair) >= 0
        read_H = mask_H if EAGER else mask_H & exists
        y_H = tl.load(y_ptr + pair * hidden + columns_H, mask=read_H, other=0.0)
        weighted_H = tl.load(weights_ptr + pair) * y_H.to(tl.float32)
        total_H += tl.where(exists, weighted_H, 0.0)
    return total_H


@triton.jit
def _sum_kernel(
    y_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    hidden,
    TOP_K: tl.constexpr,
    EAGER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (row, block): BLOCK_H columns of a row's sum.

    Shapes: y [P, H], whose rows with an id below 0 may hold anything; ids int32 and weights float32
    [P]; out [R, H].

    Example, K = 2, H = 1: y = [1, 2, 3, ?], ids = [0, 1, 0, -1], weights = [1, 0.5, 2, ?]:
    out = [2, 6].
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_H = columns_H < hidden
    total_H = _sum_of_choices(
        y_ptr, ids_ptr, weights_ptr, row, columns_H, mask_H, hidden, TOP_K, EAGER
    )
    tl.store(out_ptr + row * hidden + columns_H, total_H.to(out_ptr.dtype.element_ty), mask=mask_H)


@triton.jit
def _sum_add_rms_norm_kernel(
    y_ptr,
    ids_ptr,
    weights_ptr,
    residual_ptr,
    norm_weight_ptr,
    out_ptr,
    new_residual_ptr,
    hidden,
    residual_row_stride,
    eps,
    TOP_K: tl.constexpr,
    EAGER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (row): the row's sum, plus its residual, and the norm of that.

    Shapes as in `_sum_kernel`; residual [R, H] with a row stride, norm_weight [H], out and
    new_residual [R, H]. Rounded to the dtype after the sum and after the addition, as separate
    steps would be.

    Example, K = 2, H = 2, eps = 0: y = [[1, 0], [2, 2]], ids = [3, 5], weights = [1, 0.5],
    residual = [1, 3], norm_weight = [1, 10]: sum = [2, 1], new_residual = [3, 4],
    out = [0.849, 11.314].
    """
    columns_H = tl.arange(0, BLOCK_H)
    mask_H = columns_H < hidden
    norm_weight_H = tl.load(norm_weight_ptr + columns_H, mask=mask_H, other=0.0).to(tl.float32)
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    residual_H = tl.load(
        residual_ptr + row * residual_row_stride + columns_H, mask=mask_H, other=0.0
    ).to(tl.float32)
    total_H = _sum_of_choices(
        y_ptr, ids_ptr, weights_ptr, row, columns_H, mask_H, hidden, TOP_K, EAGER
    )

    new_residual_H = (total_H.to(dtype).to(tl.float32) + residual_H).to(dtype)
    tl.store(new_residual_ptr + row * hidden + columns_H, new_residual_H, mask=mask_H)
    x_H = new_residual_H.to(tl.float32)
    mean_square = tl.sum(x_H * x_H, axis=0) / hidden
    normed_H = (x_H * tl.rsqrt(mean_square + eps)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * hidden + columns_H, (normed_H * norm_weight_H).to(dtype), mask=mask_H)


def sum_choices(y_PH: torch.Tensor, ids_RK: torch.Tensor, weights_RK: torch.Tensor) -> torch.Tensor:
    """[R, H] in ``y``'s dtype; everything contiguous, ids int32, weights float32."""
    num_rows, top_k = ids_RK.shape
    hidden = y_PH.shape[1]
    out_RH = torch.empty(num_rows, hidden, dtype=y_PH.dtype, device=y_PH.device)
    if num_rows == 0:
        return out_RH
    use_pdl = supports_pdl(y_PH.device)
    block_h = min(SUM_BLOCK_H, triton.next_power_of_2(hidden))
    launch_kernel(
        _sum_kernel,
        (num_rows, triton.cdiv(hidden, block_h)),
        y_PH,
        ids_RK,
        weights_RK,
        out_RH,
        hidden,
        TOP_K=top_k,
        EAGER=num_rows <= EAGER_MAX_ROWS,
        BLOCK_H=block_h,
        USE_PDL=use_pdl,
        num_warps=2,
        launch_pdl=use_pdl,
    )
    return out_RH


def sum_add_rms_norm(
    y_PH: torch.Tensor,
    ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    residual_RH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(normed, new_residual)``, both new and [R, H]."""
    num_rows, top_k = ids_RK.shape
    hidden = y_PH.shape[1]
    out_RH = torch.empty(num_rows, hidden, dtype=y_PH.dtype, device=y_PH.device)
    new_residual_RH = torch.empty_like(out_RH)
    if num_rows == 0:
        return out_RH, new_residual_RH
    if residual_RH.stride(1) != 1:
        residual_RH = residual_RH.contiguous()
    use_pdl = supports_pdl(y_PH.device)
    block_h = triton.next_power_of_2(hidden)
    launch_kernel(
        _sum_add_rms_norm_kernel,
        (num_rows,),
        y_PH,
        ids_RK,
        weights_RK,
        residual_RH,
        norm_weight_H.contiguous(),
        out_RH,
        new_residual_RH,
        hidden,
        residual_RH.stride(0),
        eps,
        TOP_K=top_k,
        EAGER=num_rows <= EAGER_MAX_ROWS,
        BLOCK_H=block_h,
        USE_PDL=use_pdl,
        num_warps=max(1, min(16, block_h // NORM_COLUMNS_PER_WARP)),
        launch_pdl=use_pdl,
    )
    return out_RH, new_residual_RH
