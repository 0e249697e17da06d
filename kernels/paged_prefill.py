"""Causal attention of several new positions per sequence over a paged KV cache.

Legend: T tokens, S sequences, N query heads, G KV heads, D head dimension, B blocks, L tokens a
block, R query heads of a KV head (N / G) padded to a power of two, M rows of a tile, K keys of one.

FlashAttention-2 (https://arxiv.org/abs/2307.08691) with one row per (token, query head of a KV
head): a tile of 128 rows is 16 tokens × 8 heads, so that little of it lies above the diagonal, and
short spans fill it. The tile of a program is found on the device, from the first rows of the
sequences; those with the longest contexts come first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .floats import LOG2_E
from .launch import launch_kernel
from .paged_prefill_table import PrefillTiles, prefill_tiles


@triton.jit
def _find_tile(query_start_ptr, num_spans, tile, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """The span that holds the launch's ``tile``-th tile, and the tile's number in that span.

    Example: spans of 40 and 10 tokens, BLOCK_Q = 16: 3 tiles and 1; tile 3 is (span 1, tile 0).
    """
    spans_S = tl.arange(0, BLOCK_S)
    in_range_S = spans_S < num_spans
    start_S = tl.load(query_start_ptr + spans_S, mask=in_range_S, other=0)
    end_S = tl.load(query_start_ptr + 1 + spans_S, mask=in_range_S, other=0)
    tiles_S = tl.cdiv(end_S - start_S, BLOCK_Q)
    before_S = (tl.cumsum(tiles_S, axis=0) <= tile) & in_range_S
    return tl.sum(before_S.to(tl.int32)), tile - tl.sum(tl.where(before_S, tiles_S, 0))


@triton.jit
def _attend(
    m_M,
    l_M,
    acc_MD,
    q_MD,
    last_position_M,
    k_ptr,
    v_ptr,
    table_ptr,
    head,
    first,
    end,
    context,
    qk_scale,
    G: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to the positions first .. end - 1 (whole tiles); MASKED: causally, to the context.

    Shapes: m and l float32 [M], the running maximum of the scores times qk_scale and the sum of
    their powers of two; acc float32 and q [M, D]; last_position int32 [M]; k and v [B, L, G, D];
    table int32, of this span. Returns m, l and acc.

    Example, D = 1, qk_scale = log2(e), from nothing (m = -inf, l = acc = 0): the query 1 with the
    keys [0, ln 3] and values [1, 5] gives m = log2 3, l = 1/3 + 1 and acc = 1/3 + 5. MASKED, with
    the last position 0: m = 0, l = 1 and acc = 1.
    """
    dims_D = tl.arange(0, BLOCK_D)
    tokens_K = tl.arange(0, BLOCK_K)
    head_D = head * D + dims_D
    # Block ids are loaded a tile ahead: the pipelined loads of keys and values need not wait.
    position_K = first + tokens_K
    block_K = tl.load(table_ptr + position_K // L, mask=position_K < context, other=0)
    for start in range(first, end, BLOCK_K):
        position_K = start + tokens_K
        row_K = block_K.to(tl.int64) * L + position_K % L
        offsets_KD = row_K[:, None] * (G * D) + head_D[None, :]
        next_K = position_K + BLOCK_K
        block_K = tl.load(table_ptr + next_K // L, mask=next_K < context, other=0)
        if MASKED:
            there_KD = (position_K < context)[:, None] & (dims_D[None, :] < D)
            k_KD = tl.load(k_ptr + offsets_KD, mask=there_KD, other=0.0)
            v_KD = tl.load(v_ptr + offsets_KD, mask=there_KD, other=0.0)
        elif BLOCK_D != D:
            there_KD = (tokens_K >= 0)[:, None] & (dims_D[None, :] < D)
            k_KD = tl.load(k_ptr + offsets_KD, mask=there_KD, other=0.0)
            v_KD = tl.load(v_ptr + offsets_KD, mask=there_KD, other=0.0)
        else:
            k_KD = tl.load(k_ptr + offsets_KD)
            v_KD = tl.load(v_ptr + offsets_KD)

        scores_MK = tl.dot(q_MD, k_KD.to(q_MD.dtype).T, input_precision="ieee")
        if MASKED:
            seen_MK = position_K[None, :] <= last_position_M[:, None]
            scores_MK = tl.where(seen_MK, scores_MK, float("-inf"))
        new_m_M = tl.maximum(m_M, tl.max(scores_MK, axis=1) * qk_scale)
        p_MK = tl.exp2(scores_MK * qk_scale - new_m_M[:, None])
        old_M = tl.exp2(m_M - new_m_M)
        l_M = l_M * old_M + tl.sum(p_MK, axis=1)
        m_M = new_m_M
        acc_MD = tl.dot(
            p_MK.to(q_MD.dtype),
            v_KD.to(q_MD.dtype),
            acc_MD * old_M[:, None],
            input_precision="ieee",
        )
    return m_M, l_M, acc_MD


# Numbers that change from step to step, so that they do not each get a kernel of their own.
@triton.jit(do_not_specialize=["block_table_stride", "first_span", "num_spans"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    context_ptr,
    query_start_ptr,
    out_ptr,
    block_table_stride,
    first_span,
    num_spans,
    qk_scale,
    v_scale,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Attend the BLOCK_M / R tokens × R heads of one tile to their contexts.

    Shapes: q and out [T, N, D]; k and v [B, L, G, D]; block_table int32 [S, ...] with a row
    stride; context int32 [S]; query_start int32 [S + 1]. Spans first_span .. + num_spans - 1 are
    attended to. Grid: (G, tiles of these spans). qk_scale is positive.

    Example: a span of 2 tokens with a context of 5 has its queries at the positions 3 and 4; its
    tile reads the positions 0 .. 4, and the first token's rows mask the last of them.
    """
    GROUP: tl.constexpr = N // G
    BLOCK_Q: tl.constexpr = BLOCK_M // R
    head = tl.program_id(0)
    # The last tiles of a span have the longest contexts.
    last_first = tl.num_programs(1) - 1 - tl.program_id(1)
    span, tile = _find_tile(query_start_ptr + first_span, num_spans, last_first, BLOCK_Q, BLOCK_S)
    span += first_span
    first_row = tl.load(query_start_ptr + span)
    query_len = tl.load(query_start_ptr + span + 1) - first_row
    context = tl.load(context_ptr + span)
    table_ptr = block_table_ptr + span.to(tl.int64) * block_table_stride

    rows_M = tl.arange(0, BLOCK_M)
    dims_D = tl.arange(0, BLOCK_D)
    token_M = tile * BLOCK_Q + rows_M // R
    head_M = rows_M % R
    offsets_MD = ((first_row + token_M).to(tl.int64) * N + head * GROUP + head_M)[:, None] * D
    offsets_MD += dims_D[None, :]
    there_MD = ((token_M < query_len) & (head_M < GROUP))[:, None] & (dims_D[None, :] < D)
    q_MD = tl.load(q_ptr + offsets_MD, mask=there_MD, other=0.0)

    first_position = context - query_len + tile * BLOCK_Q
    last_position_M = tl.minimum(first_position + rows_M // R, context - 1)
    # Up to here every row sees every key.
    masked_from = (first_position + 1) // BLOCK_K * BLOCK_K
    end = tl.minimum(first_position + BLOCK_Q, context)
    m_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_M, l_M, acc_MD = _attend(
        m_M, l_M, acc_MD, q_MD, last_position_M, k_ptr, v_ptr, table_ptr, head,
        0, masked_from, context, qk_scale, G, D, L, BLOCK_D, BLOCK_K, MASKED=False,
    )  # fmt: skip
    m_M, l_M, acc_MD = _attend(
        m_M, l_M, acc_MD, q_MD, last_position_M, k_ptr, v_ptr, table_ptr, head,
        masked_from, end, context, qk_scale, G, D, L, BLOCK_D, BLOCK_K, MASKED=True,
    )  # fmt: skip
    out_MD = acc_MD / l_M[:, None] * v_scale
    tl.store(out_ptr + offsets_MD, out_MD.to(out_ptr.dtype.element_ty), mask=there_MD)


def paged_prefill(
    q_TND: torch.Tensor,
    k_cache_BLGD: torch.Tensor,
    v_cache_BLGD: torch.Tensor,
    block_tables_SB: torch.Tensor,
    context_lens_S: torch.Tensor,
    query_starts_S: torch.Tensor,
    first_span: int,
    query_lens: list[int],
    scale: float,
    out_TND: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    tiles: PrefillTiles | None = None,
) -> None:
    """Attend the queries of some sequences to their contexts, into their rows of ``out_TND``.

    The arguments are checked by the caller: q and out contiguous, of one dtype; caches contiguous,
    of that dtype or float8_e4m3fn; tables, contexts and starts int32 of all S sequences (S + 1
    starts, rows of q), columns side by side. Cache entries outside the contexts are not used.

    Args:
        first_span: the first of these sequences, which follow one another.
        query_lens: their rows, on the host; each at least 1 and at most its context.
        scale: positive factor on the scores.
        k_scale, v_scale: what the cached keys and values are multiplied by.
        tiles: None: the committed ones.
    """
    num_heads, head_dim = q_TND.shape[1:]
    block_size, num_kv_heads = k_cache_BLGD.shape[1:3]
    rows = triton.next_power_of_2(num_heads // num_kv_heads)
    tiles = tiles or prefill_tiles(head_dim, q_TND.dtype)
    block_m = max(tiles.rows, rows)
    num_tiles = sum(triton.cdiv(query_len, block_m // rows) for query_len in query_lens)
    if num_tiles == 0:
        return
    launch_kernel(
        _prefill_kernel,
        (num_kv_heads, num_tiles),
        q_TND,
        k_cache_BLGD,
        v_cache_BLGD,
        block_tables_SB,
        context_lens_S,
        query_starts_S,
        out_TND,
        block_tables_SB.stride(0),
        first_span,
        len(query_lens),
        scale * k_scale * LOG2_E.value,
        v_scale,
        N=num_heads,
        G=num_kv_heads,
        D=head_dim,
        L=block_size,
        R=rows,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=block_m,
        BLOCK_K=tiles.keys,
        # In wide steps, so that few variants of the kernel are compiled.
        BLOCK_S=next(size for size in (16, 256, 4096, 1 << 16) if len(query_lens) <= size),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
