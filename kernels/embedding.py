"""The embedding: rows of a table by their ids, in one launch that begins early.

Legend: T tokens, H hidden size, P rows of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import launch_kernel, supports_pdl

# Columns that a program copies: 16 bytes of bfloat16 for each thread.
MAX_BLOCK = 1024
NUM_WARPS = 4


# Ids are read one by one, so where they begin makes no difference.
@triton.jit(do_not_specialize=["first", "last"], do_not_specialize_on_alignment=["ids_ptr"])
def _embedding_kernel(
    ids_ptr,
    weight_ptr,
    out_ptr,
    first,
    last,
    num_columns,
    weight_stride,
    BLOCK_H: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (token, block of columns): copy a part of the token's row, or zeros.

    Shapes: ids int64 [T]; weight [P, H] of any dtype with a row stride, its row 0 being that of the
    id ``first``; out [T, H] contiguous. Ids outside [first, last) give zeros.

    Example: first 2, last 4, weight [[1, 1], [5, 6], [9, 9]], ids [3, 4, 0]: [[5, 6], [0, 0],
    [0, 0]]; row 2 of the table is not used.
    """
    if USE_PDL:
        cuda.gdc_wait()
        # Only now: a kernel behind the next ones may read, before its own wait, what the kernel
        # before this one wrote (positions and block tables of a decode step).
        cuda.gdc_launch_dependents()
    # int64, because row * stride passes 2^31 in large tables and batches.
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + token) - first
    exists = (row >= 0) & (row < last - first)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < num_columns
    values = tl.load(weight_ptr + row * weight_stride + columns, mask=inside & exists, other=0.0)
    tl.store(out_ptr + token * num_columns + columns, values, mask=inside)


def embedding(
    token_ids_T: torch.Tensor, weight_PH: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """Rows [T, H] of a shard of the table; the arguments are checked by the caller."""
    num_tokens, num_columns = len(token_ids_T), weight_PH.shape[1]
    out_TH = torch.empty(num_tokens, num_columns, dtype=weight_PH.dtype, device=weight_PH.device)
    if num_tokens == 0:
        return out_TH
    block = min(MAX_BLOCK, triton.next_power_of_2(num_columns))
    use_pdl = supports_pdl(weight_PH.device)
    launch_kernel(
        _embedding_kernel,
        (num_tokens, triton.cdiv(num_columns, block)),
        token_ids_T,
        weight_PH,
        out_TH,
        first,
        last,
        num_columns,
        weight_PH.stride(0),
        BLOCK_H=block,
        USE_PDL=use_pdl,
        num_warps=NUM_WARPS,
        launch_pdl=use_pdl,
    )
    return out_TH
