"""RMSNorm, alone and fused with the residual addition and the sum of a layer's parts.

Legend: R rows (all leading dimensions flattened), H the normalised size, S parts.

Memory-bound: each row is read once and written once, so a program holds whole rows in registers.
Short rows, such as attention heads, share a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import launch_kernel, supports_pdl

# Elements that a program holds at once: one long row, or several short ones.
TILE_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_rows", "x_part_stride"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    new_residual_ptr,
    num_rows,
    num_columns,
    x_row_stride,
    x_part_stride,
    residual_row_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Normalise BLOCK_R rows; with HAS_RESIDUAL, add and store the residual first.

    Shapes: x and residual [R, H] with a row stride each and columns side by side; weight [H];
    out and new_residual [R, H] contiguous. One dtype for all, float32 arithmetic. With NUM_PARTS
    > 1 x is float32 [S, R, H], and the sum of the parts, rounded to the dtype, takes its place.

    Example, one row, H = 2, eps = 0: x = [2, 1], residual = [1, 3], weight = [1, 10]
        new_residual = [3, 4], mean square = (9 + 16) / 2 = 12.5, its root = 3.536
        out = [3 / 3.536 * 1, 4 / 3.536 * 10] = [0.849, 11.314]
    """
    # int64, because row * stride passes 2^31 in large batches.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    columns = tl.arange(0, BLOCK_H)[None, :]
    mask = (rows < num_rows) & (columns < num_columns)
    dtype = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()

    x_ptr += rows * x_row_stride + columns
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        x += tl.load(x_ptr + part * x_part_stride, mask=mask, other=0.0)
    x = x.to(dtype).to(tl.float32)
    if HAS_RESIDUAL:
        residual_offsets = rows * residual_row_stride + columns
        residual = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0).to(tl.float32)
        # The norm sees the sum as it is stored, rounded to the dtype.
        new_residual = (x + residual).to(dtype)
        tl.store(new_residual_ptr + rows * num_columns + columns, new_residual, mask=mask)
        x = new_residual.to(tl.float32)

    mean_square = tl.sum(x * x, axis=1, keep_dims=True) / num_columns
    normed = (x * tl.rsqrt(mean_square + eps)).to(dtype).to(tl.float32)
    tl.store(out_ptr + rows * num_columns + columns, (normed * weight).to(dtype), mask=mask)


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise ``x`` [..., H] over its last dimension; the arguments are checked by the caller."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight_H, out, None, eps)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(normed, residual + x)``, both new and like ``x`` [..., H]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = torch.empty_like(out)
    _launch(x, residual, weight_H, out, new_residual, eps)
    return out, new_residual


def split_add_rms_norm(
    parts_SRH: torch.Tensor, residual_RH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` of the sum of contiguous float32 parts, like ``residual_RH``.

    The sum is rounded to the dtype of residual and weight, which both results have.

    Example, eps 0: parts [[[1, 1]], [[1, 0]]], residual [[1, 3]] and weight [1, 10] give
    ([[0.849, 11.314]], [[3, 4]]).
    """
    out_RH = torch.empty(residual_RH.shape, dtype=residual_RH.dtype, device=residual_RH.device)
    new_residual_RH = torch.empty_like(out_RH)
    _launch(parts_SRH[0], residual_RH, weight_H, out_RH, new_residual_RH, eps, len(parts_SRH))
    return out_RH, new_residual_RH


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight_H: torch.Tensor,
    out: torch.Tensor,
    new_residual: torch.Tensor | None,
    eps: float,
    num_parts: int = 1,
) -> None:
    x_RH = _rows(x)
    residual_RH = x_RH if residual is None else _rows(residual)
    num_rows, num_columns = x_RH.shape
    if num_rows == 0:
        return
    block_h = triton.next_power_of_2(num_columns)
    block_r = max(1, TILE_ELEMENTS // block_h)
    grid = (triton.cdiv(num_rows, block_r),)
    use_pdl = supports_pdl(x.device)
    launch_kernel(
        _rms_norm_kernel,
        grid,
        x_RH,
        residual_RH,
        weight_H.contiguous(),
        out,
        out if new_residual is None else new_residual,
        num_rows,
        num_columns,
        x_RH.stride(0),
        x_RH.numel(),  # the parts lie one after the other
        residual_RH.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        NUM_PARTS=num_parts,
        BLOCK_R=block_r,
        BLOCK_H=block_h,
        USE_PDL=use_pdl,
        num_warps=8 if block_h > TILE_ELEMENTS else 4,
        launch_pdl=use_pdl,
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as [R, H] with columns side by side; a copy only where no view has that layout."""
    x_RH = x.reshape(-1, x.shape[-1])
    return x_RH if x_RH.stride(1) == 1 else x_RH.contiguous()
