"""How `paged_decode` cuts contexts into chunks, and how it puts the chunks' results together.

Legend: S sequences, N query heads, G KV heads, D head dimension, F = D / 2, C chunks of a context,
R query heads of a KV head (N / G) padded to a power of two.

Example of the cut, TILE = 64 and MAX_CHUNKS = 16: a context of 576 tokens is 9 tiles and 9 chunks;
2048 tokens are 32 tiles, 16 chunks of 2. With 4 splits of at least 64 tokens, the programs of the
former have 3, 3, 3 and 0 chunks; with at least 1024 tokens a program, the first has all 9.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_dims(F: tl.constexpr, BLOCK_F: tl.constexpr):
    """A head's dimensions as two halves filled up to BLOCK_F each, and which of these exist.

    Example: F = 3, BLOCK_F = 4: 0 1 2 - 3 4 5 -, where - does not exist.
    """
    dims_D = tl.arange(0, 2 * BLOCK_F)
    return dims_D // BLOCK_F * F + dims_D % BLOCK_F, dims_D % BLOCK_F < F


@triton.jit
def cut(context, TILE: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """Tiles of a context, tiles a chunk, and chunks: the cut that depends on the length alone.

    Numbers, int32. Example, TILE = 64, MAX_CHUNKS = 16: 576 tokens give (9, 1, 9), 2048 give
    (32, 2, 16), and none (0, 1, 0).
    """
    num_tiles = tl.cdiv(context, TILE)
    tiles_per_chunk = tl.maximum(tl.cdiv(num_tiles, MAX_CHUNKS), 1)
    return num_tiles, tiles_per_chunk, tl.cdiv(num_tiles, tiles_per_chunk)


@triton.jit
def count_chunks_per_program(context, num_chunks, num_splits, min_tokens):
    """How many chunks each program of a (sequence, KV head) takes."""
    num_programs = tl.minimum(tl.cdiv(context, min_tokens), num_splits)
    return tl.cdiv(num_chunks, tl.maximum(num_programs, 1))


@triton.jit
def fold(m_R, l_R, acc_RD, chunk_m_R, chunk_l_R, chunk_acc_RD):
    """Append one chunk to a running softmax; the fused multiply-adds leave no rounding open.

    Shapes: m and l float32 [R], maximum and sum, in powers of two; acc float32 [R, D].

    Example, D = 1: (m, l, acc) = (0, 1, 1) and (log2 3, 1, 5) give (log2 3, 1/3 + 1, 1/3 + 5).
    """
    new_m_R = tl.maximum(m_R, chunk_m_R)
    old_R = tl.exp2(m_R - new_m_R)
    new_R = tl.exp2(chunk_m_R - new_m_R)
    l_R = tl.fma(l_R, old_R, chunk_l_R * new_R)
    old_RD = tl.broadcast_to(old_R[:, None], acc_RD.shape)
    acc_RD = tl.fma(acc_RD, old_RD, chunk_acc_RD * new_R[:, None])
    return new_m_R, l_R, acc_RD


@triton.jit
def merge(
    partial_ptr,
    stats_ptr,
    pair,
    num_chunks,
    F: tl.constexpr,
    R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Fold the chunks of one (sequence, KV head) in order; the loads go around the L1 cache.

    Shapes: partial float32 [S * G, MAX_CHUNKS, R, D]; stats float32 [S * G, MAX_CHUNKS, 2, R], m
    and l. Returns l [R] and acc [R, 2 * BLOCK_F], float32.

    Example, D = 2 with only the first dimension in use: two chunks with the stats [0, 1] and
    [log2 3, 1] and the partials 1 and 5 give l = 4/3 and acc = 16/3.
    """
    D: tl.constexpr = 2 * F
    rows_R = tl.arange(0, R)
    dims_D, in_head_D = head_dims(F, BLOCK_F)
    m_R = tl.full([R], float("-inf"), tl.float32)
    l_R = tl.zeros([R], tl.float32)
    acc_RD = tl.zeros([R, 2 * BLOCK_F], tl.float32)
    offsets_RD = rows_R[:, None] * D + dims_D[None, :]
    in_head_RD = (rows_R[:, None] >= 0) & in_head_D[None, :]
    first = pair.to(tl.int64) * MAX_CHUNKS
    for group in range(0, num_chunks, UNROLL):
        for step in tl.static_range(UNROLL):
            chunk = group + step
            there = chunk < num_chunks
            stats = stats_ptr + (first + chunk) * (2 * R) + rows_R
            chunk_m_R = tl.load(stats, mask=there, other=float("-inf"), cache_modifier=".cg")
            chunk_l_R = tl.load(stats + R, mask=there, other=0.0, cache_modifier=".cg")
            chunk_acc_RD = tl.load(
                partial_ptr + (first + chunk) * (R * D) + offsets_RD,
                mask=in_head_RD & there,
                other=0.0,
                cache_modifier=".cg",
            )
            m_R, l_R, acc_RD = fold(m_R, l_R, acc_RD, chunk_m_R, chunk_l_R, chunk_acc_RD)
    return l_R, acc_RD


@triton.jit
def store_output(
    out_ptr, sequence, head, l_R, acc_RD, v_scale, N: tl.constexpr, GROUP: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """Divide by the softmax's sum and write the group's rows; an empty context gives zeros.

    Shapes: l float32 [R]; acc float32 [R, 2 * BLOCK_F]; out [S, N, D] of any float dtype.

    Example: l = 4/3, acc = 16/3 and v_scale 0.5 give 2.
    """
    D: tl.constexpr = 2 * F
    rows_R = tl.arange(0, R)
    dims_D, in_head_D = head_dims(F, BLOCK_F)
    out_RD = acc_RD / tl.where(l_R == 0.0, 1.0, l_R)[:, None] * v_scale
    row = sequence.to(tl.int64) * N + head * GROUP
    tl.store(
        out_ptr + row * D + rows_R[:, None] * D + dims_D[None, :],
        out_RD.to(out_ptr.dtype.element_ty),
        mask=(rows_R[:, None] < GROUP) & in_head_D[None, :],
    )


@triton.jit(do_not_specialize=["num_splits", "min_tokens"])
def merge_kernel(
    partial_ptr,
    stats_ptr,
    context_ptr,
    out_ptr,
    num_splits,
    min_tokens,
    v_scale,
    N: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TILE: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Fold the chunks that several programs left in a kernel of its own. Grid: (G, S).

    Shapes: partial float32 [S * G, MAX_CHUNKS, R, D]; stats float32 [S * G, MAX_CHUNKS, 2, R];
    context int32 [S]; out [S, N, D].

    Example, D = 1: chunks with (m, l, acc) = (0, 1, 1) and (log2 3, 1, 5) fold to m = log2 3,
    l = 1/3 + 1 and acc = 1/3 + 5; the output is acc / l = 4.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    context = tl.load(context_ptr + sequence)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    _, _, num_chunks = cut(context, TILE, MAX_CHUNKS)
    if count_chunks_per_program(context, num_chunks, num_splits, min_tokens) >= num_chunks:
        return
    pair = sequence * G + head
    l_R, acc_RD = merge(partial_ptr, stats_ptr, pair, num_chunks, F, R, BLOCK_F, MAX_CHUNKS, UNROLL)
    store_output(out_ptr, sequence, head, l_R, acc_RD, v_scale, N, N // G, F, R, BLOCK_F)
