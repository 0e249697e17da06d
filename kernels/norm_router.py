"""The residual addition, the norm and the router of many rows, in one launch.

Legend: T tokens, E experts, H hidden size, K experts per token.

Memory-bound: apart, the norm writes the tokens for the router to read once more. Here a program
walks over its tokens' columns twice. The first walk adds, sums the squares and multiplies with the
gate matrix; since a norm only scales a row, it multiplies the rows that are not scaled yet, and
scales their logits afterwards (``csrc/norm_router.cu`` does the same for few rows). The second
walk finds the sums in the L2 cache, and writes them normed.

So the logits are those of the norm before it is rounded: experts that are all but equally likely
may come out in another order than from `rms_norm.add_rms_norm` and `router.route`. A row's bits
depend on the number of rows, but not on the others or on its place among them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import launch_kernel, shared_bytes, supports_pdl
from .top_k import MAX_LOGITS, select_top_k

# (tokens up to, tokens a program, warps, stages of the first walk): programs for about every
# multiprocessor, and so many stages that its loads on their way outweigh the memory's latency.
# The gate matrix comes from L2 for each program, so many tokens want large tiles.
LAUNCHES = ((2048, 16, 4, 3), (4096, 32, 8, 3), (1 << 62, 64, 16, 3))
# Columns of a step of the first walk, in bytes: two lines of the cache from each row at a time, one
# where more experts leave no room for two stages.
STEP_BYTES = 256
MAX_EXPERTS_OF_LONG_STEPS = 256
# Of the second: a step loads without waiting what each thread then writes.
WRITE_BYTES = 512
# Logits that a warp holds; the most experts of the smallest tile; and shared memory for the stages,
# of which many experts leave room for fewer.
LOGITS_PER_WARP = 512
MAX_EXPERTS = 512
STAGES_BYTES = 192 * 1024
# What a program must be able to have: A100 and smaller cards run norm and router apart.
SHARED_BYTES = 200 * 1024

# Not float16, where an entry of the residual stream times its weight may be infinite.
DTYPES = (torch.bfloat16, torch.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_router_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    gate_ptr,
    num_tokens_ptr,
    logits_ptr,
    normed_ptr,
    new_residual_ptr,
    ids_ptr,
    weights_ptr,
    num_rows,
    num_experts,
    hidden,
    x_row_stride,
    residual_row_stride,
    eps,
    HAS_X: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PADDED_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WRITE_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (tile): norm and experts of BLOCK_T rows.

    Shapes: x and residual [T, H] with a row stride each; norm_weight [H]; gate [E, H]; normed and
    new_residual [T, H] contiguous; one dtype for all. logits is float32 scratch [T, PADDED_E]; ids
    int32 and weights float32 [T, TOP_K]; num_tokens int32 [1], of how many rows are tokens.
    Without HAS_X, residual holds the sum already, and new_residual is not written.

    Example, H = 2, E = 2, eps = 0: x = [2, 1], residual = [1, 3], weight = [1, 10],
    gate = [[1, 0], [0, 1]]
        new_residual = [3, 4], times the weight [3, 40], times the gate [3, 40]
        mean square = (9 + 16) / 2 = 12.5, so the scale is 1 / 3.536: logits = [0.849, 11.314]
        normed = [3 / 3.536 * 1, 4 / 3.536 * 10] = [0.849, 11.314], here the same as the logits
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    rows_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    # int64, because row * stride passes 2^31 in large batches.
    rows_T1 = rows_T.to(tl.int64)[:, None]
    in_batch_T1 = (rows_T < num_rows)[:, None]
    num_real_rows = num_rows
    if HAS_NUM_TOKENS:
        num_real_rows = tl.load(num_tokens_ptr)
    dtype = normed_ptr.dtype.element_ty

    experts_E = tl.arange(0, PADDED_E)
    columns_1H = tl.arange(0, BLOCK_H)[None, :]
    gate_EH = gate_ptr + experts_E[:, None] * hidden + columns_1H
    residual_TH = residual_ptr + rows_T1 * residual_row_stride + columns_1H
    squares_TH = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    logits_ET = tl.zeros([PADDED_E, BLOCK_T], tl.float32)
    for first in range(0, hidden, BLOCK_H):
        in_row_1H = first + columns_1H < hidden
        mask_TH = in_batch_T1 & in_row_1H
        gate_mask_EH = (experts_E < num_experts)[:, None] & in_row_1H
        gate = tl.load(gate_EH + first, mask=gate_mask_EH, other=0.0)
        weight_1H = tl.load(norm_weight_ptr + first + columns_1H, mask=in_row_1H, other=0.0)
        total_TH = tl.load(residual_TH + first, mask=mask_TH, other=0.0)
        if HAS_X:
            x_TH = x_ptr + rows_T1 * x_row_stride + first + columns_1H
            x = tl.load(x_TH, mask=mask_TH, other=0.0).to(tl.float32)
            # Norm and router see the sum as it is stored, rounded to the dtype.
            total_TH = (x + total_TH.to(tl.float32)).to(dtype)
            tl.store(
                new_residual_ptr + rows_T1 * hidden + first + columns_1H, total_TH, mask=mask_TH
            )
        values_TH = total_TH.to(tl.float32)
        squares_TH += values_TH * values_TH
        weighted_TH = (values_TH * weight_1H.to(tl.float32)).to(dtype)
        logits_ET = tl.dot(gate, tl.trans(weighted_TH), logits_ET, input_precision="ieee")
    mean_square_T1 = tl.sum(squares_TH, axis=1, keep_dims=True) / hidden
    scale_T1 = tl.rsqrt(mean_square_T1 + eps)

    # Through memory, after which a row lies in one warp: the selection reduces rows over and over,
    # which in the layout of the matrix product would take all warps each time.
    logits_TE = logits_ptr + rows_T1 * PADDED_E + experts_E[None, :]
    tl.store(logits_TE, tl.trans(logits_ET) * scale_T1, mask=in_batch_T1)
    tl.debug_barrier()  # which all threads have stored, and the sums

    if HAS_X:
        total_ptr = new_residual_ptr
        total_row_stride = hidden
    else:
        total_ptr = residual_ptr
        total_row_stride = residual_row_stride
    write_columns_1H = tl.arange(0, WRITE_H)[None, :]
    # One stage: the shared memory is the first walk's.
    for first in tl.range(0, hidden, WRITE_H, num_stages=1):
        in_row_1H = first + write_columns_1H < hidden
        mask_TH = in_batch_T1 & in_row_1H
        total_TH = tl.load(
            total_ptr + rows_T1 * total_row_stride + first + write_columns_1H,
            mask=mask_TH,
            other=0.0,
            cache_modifier=".cg",
        )
        weight_1H = tl.load(norm_weight_ptr + first + write_columns_1H, mask=in_row_1H, other=0.0)
        # Rounded where `rms_norm` rounds.
        normed_TH = (total_TH.to(tl.float32) * scale_T1).to(dtype).to(tl.float32)
        normed_TH = (normed_TH * weight_1H.to(tl.float32)).to(dtype)
        tl.store(normed_ptr + rows_T1 * hidden + first + write_columns_1H, normed_TH, mask=mask_TH)

    select_top_k(
        tl.load(logits_TE, mask=in_batch_T1, other=0.0, cache_modifier=".cg"),
        rows_T,
        num_rows,
        num_real_rows,
        num_experts,
        ids_ptr,
        weights_ptr,
        TOP_K,
        NORMALIZE,
        PADDED_E,
        BLOCK_T,
        BLOCK_K,
    )


def takes(x: torch.Tensor, num_experts: int) -> bool:
    """Whether the kernel takes rows like these, on their device, and so many experts."""
    return x.dtype in DTYPES and num_experts <= MAX_EXPERTS and _has_room(x.device)


def _has_room(device: torch.device) -> bool:
    room = shared_bytes(device)
    return room is None or room >= SHARED_BYTES


def norm_router(
    x_TH: torch.Tensor | None,
    residual_TH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
    gate_EH: torch.Tensor,
    top_k: int,
    normalize: bool,
    num_tokens_1: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(normed, new_residual, ids, weights)``; `takes` has said yes, the caller has checked.

    Args:
        x_TH: of the dtype of ``residual_TH``, weight and gate; None: ``residual_TH`` is the sum
            already, and comes back as it is.
        num_tokens_1: int32, how many rows are tokens; the others get ids -1 and weights 0. None:
            all.

    Returns:
        Normed and new residual [T, H] of that dtype, ids int32 [T, K] and weights float32 [T, K].

    Example, eps 0, top_k 1, normalize: x = [[2, 1]], residual = [[1, 3]], weight = [1, 10], gate =
    [[1, 0], [0, 1]] give normed = [[0.849, 11.314]], new_residual = [[3, 4]], ids = [[1]] and
    weights = [[1]].
    """
    num_rows, hidden = residual_TH.shape
    num_experts = gate_EH.shape[0]
    device, dtype = residual_TH.device, residual_TH.dtype
    residual_TH = _with_columns_side_by_side(residual_TH)
    normed_TH = torch.empty(num_rows, hidden, dtype=dtype, device=device)
    new_residual_TH = residual_TH
    if x_TH is not None:
        x_TH = _with_columns_side_by_side(x_TH)
        new_residual_TH = torch.empty_like(normed_TH)
    ids_TK = torch.empty(num_rows, top_k, dtype=torch.int32, device=device)
    weights_TK = torch.empty(num_rows, top_k, dtype=torch.float32, device=device)
    if num_rows == 0:
        return normed_TH, new_residual_TH, ids_TK, weights_TK
    padded_experts = max(16, triton.next_power_of_2(num_experts))
    block_t, num_warps, num_stages, step_bytes = _launch_shape(num_rows, padded_experts)
    element_bytes = residual_TH.element_size()
    use_pdl = supports_pdl(device)
    launch_kernel(
        _norm_router_kernel,
        (triton.cdiv(num_rows, block_t),),
        x_TH,
        residual_TH,
        norm_weight_H.contiguous(),
        gate_EH.contiguous(),
        num_tokens_1,
        torch.empty(num_rows, padded_experts, dtype=torch.float32, device=device),
        normed_TH,
        None if x_TH is None else new_residual_TH,
        ids_TK,
        weights_TK,
        num_rows,
        num_experts,
        hidden,
        0 if x_TH is None else x_TH.stride(0),
        residual_TH.stride(0),
        eps,
        HAS_X=x_TH is not None,
        HAS_NUM_TOKENS=num_tokens_1 is not None,
        TOP_K=top_k,
        NORMALIZE=normalize,
        PADDED_E=padded_experts,
        BLOCK_T=block_t,
        BLOCK_H=step_bytes // element_bytes,
        WRITE_H=WRITE_BYTES // element_bytes,
        BLOCK_K=triton.next_power_of_2(top_k),
        USE_PDL=use_pdl,
        num_warps=num_warps,
        num_stages=num_stages,
        launch_pdl=use_pdl,
    )
    return normed_TH, new_residual_TH, ids_TK, weights_TK


def _launch_shape(num_rows: int, padded_experts: int) -> tuple[int, int, int, int]:
    """Tokens a program, warps, stages, bytes of each row in a step.

    Example: of 256 experts only 32 tokens, whose logits take 16 warps; a stage is 256 bytes of each
    expert, and of each token's residual and x, 80 KiB, so there are 2.
    """
    block_t, num_warps, num_stages = next(row[1:] for row in LAUNCHES if num_rows <= row[0])
    block_t = min(block_t, max(16, MAX_LOGITS // padded_experts))
    num_warps = max(num_warps, padded_experts * block_t // LOGITS_PER_WARP)
    step_bytes = STEP_BYTES if padded_experts <= MAX_EXPERTS_OF_LONG_STEPS else STEP_BYTES // 2
    stage_bytes = (padded_experts + 2 * block_t) * step_bytes
    return block_t, num_warps, min(num_stages, max(2, STAGES_BYTES // stage_bytes)), step_bytes


def _with_columns_side_by_side(x_TH: torch.Tensor) -> torch.Tensor:
    return x_TH if x_TH.stride(1) == 1 else x_TH.contiguous()
