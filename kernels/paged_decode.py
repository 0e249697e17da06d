"""Decode attention over a paged KV cache: one query position per sequence.

Legend: S sequences, N query heads, G KV heads, D head dimension, B blocks, L tokens a block,
C chunks of a context, R query heads of a KV head (N / G) padded to a power of two.

Memory-bound: a step reads every cached key and value once. Split-KV attention (flash-decoding,
https://pytorch.org/blog/flash-decoding): a context is cut into at most MAX_CHUNKS chunks of whole
tiles, by its length alone. A chunk is attended to by itself, and the chunks' results are folded in
order. How many programs share the chunks depends on the launch, but not what is computed: a
sequence's output has the same bits alone, in any batch and in any bucket of a CUDA graph.

Example of the cut, TILE = 64 and MAX_CHUNKS = 16: a context of 576 tokens is 9 tiles and 9 chunks;
2048 tokens are 32 tiles, 16 chunks of 2. With 4 splits of at least 64 tokens, the programs of the
former have 3, 3, 3 and 0 chunks; with at least 1024 tokens a program, the first has all 9.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import arrival_counters
from .paged_decode_table import (
    DecodeLaunch,
    DecodeTiles,
    decode_launch,
    decode_tiles,
)

LOG2_E = 1.4426950408889634


@triton.jit
def _fold(m_R, l_R, acc_RD, chunk_m_R, chunk_l_R, chunk_acc_RD):
    """Append one chunk to a running softmax; the fused multiply-adds leave no rounding open."""
    new_m_R = tl.maximum(m_R, chunk_m_R)
    old_R = tl.exp2(m_R - new_m_R)
    new_R = tl.exp2(chunk_m_R - new_m_R)
    l_R = tl.fma(l_R, old_R, chunk_l_R * new_R)
    old_RD = tl.broadcast_to(old_R[:, None], acc_RD.shape)
    acc_RD = tl.fma(acc_RD, old_RD, chunk_acc_RD * new_R[:, None])
    return new_m_R, l_R, acc_RD


@triton.jit
def _merge(
    partial_ptr,
    stats_ptr,
    pair,
    num_chunks,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Fold the chunks of one (sequence, KV head) in order; the loads go around the L1 cache."""
    rows_R = tl.arange(0, R)
    dims_D = tl.arange(0, BLOCK_D)
    m_R = tl.full([R], float("-inf"), tl.float32)
    l_R = tl.zeros([R], tl.float32)
    acc_RD = tl.zeros([R, BLOCK_D], tl.float32)
    offsets_RD = rows_R[:, None] * D + dims_D[None, :]
    in_head_RD = (rows_R[:, None] >= 0) & (dims_D[None, :] < D)
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
            m_R, l_R, acc_RD = _fold(m_R, l_R, acc_RD, chunk_m_R, chunk_l_R, chunk_acc_RD)
    return l_R, acc_RD


@triton.jit
def _store_output(
    out_ptr, sequence, head, l_R, acc_RD, v_scale, N: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Divide by the softmax's sum and write the group's rows; an empty context gives zeros."""
    rows_R = tl.arange(0, R)
    dims_D = tl.arange(0, BLOCK_D)
    out_RD = acc_RD / tl.where(l_R == 0.0, 1.0, l_R)[:, None] * v_scale
    row = sequence.to(tl.int64) * N + head * GROUP
    tl.store(
        out_ptr + row * D + rows_R[:, None] * D + dims_D[None, :],
        out_RD.to(out_ptr.dtype.element_ty),
        mask=(rows_R[:, None] < GROUP) & (dims_D[None, :] < D),
    )


@triton.jit
def _cut(context, TILE: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """Tiles of a context, tiles a chunk, and chunks: the cut that depends on the length alone."""
    num_tiles = tl.cdiv(context, TILE)
    tiles_per_chunk = tl.maximum(tl.cdiv(num_tiles, MAX_CHUNKS), 1)
    return num_tiles, tiles_per_chunk, tl.cdiv(num_tiles, tiles_per_chunk)


@triton.jit
def _chunks_per_program(context, num_chunks, num_splits, min_tokens):
    """How many chunks each program of a (sequence, KV head) takes."""
    num_programs = tl.minimum(tl.cdiv(context, min_tokens), num_splits)
    return tl.cdiv(num_chunks, tl.maximum(num_programs, 1))


@triton.jit(do_not_specialize=["block_table_stride", "num_splits", "min_tokens"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    context_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    arrivals_ptr,
    block_table_stride,
    num_splits,
    min_tokens,
    qk_scale,
    v_scale,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
    LAST_ARRIVER: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Attend the R query heads of one KV head to one program's share of a context.

    Shapes: q and out [S, N, D]; k and v [B, L, G, D]; block_table int32 [S, ...] with a row
    stride; context int32 [S]; partial float32 [S * G, MAX_CHUNKS, R, D]; stats float32
    [S * G, MAX_CHUNKS, 2, R]; arrivals int32 [S * G], zero before and after the launch.
    Grid: (G, S, num_splits).

    Example, N = G = D = 1, scale 1, keys [0, ln 3] and values [1, 5], query 1: the weights are
    1/4 and 3/4, the output is 4. With a chunk a key, the partials are (m, l, acc) = (0, 1, 1) and
    (log2 3, 1, 5); folded: m = log2 3, l = 1/3 + 1, acc = 1/3 + 5, and acc / l = 4.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = N // G
    # The dot's M dimension is at least 16.
    M: tl.constexpr = 16 if R < 16 else R

    # Step inputs: complete before the step's first kernel began, so there is no wait for them.
    context = tl.load(context_ptr + sequence)
    num_tiles, tiles_per_chunk, num_chunks = _cut(context, TILE, MAX_CHUNKS)
    chunks_per_program = num_chunks
    if SPLIT:
        chunks_per_program = _chunks_per_program(context, num_chunks, num_splits, min_tokens)
    first_tile = split * chunks_per_program * tiles_per_chunk
    last_tile = tl.minimum(first_tile + chunks_per_program * tiles_per_chunk, num_tiles)
    table_ptr = block_table_ptr + sequence.to(tl.int64) * block_table_stride
    tokens_K = tl.arange(0, TILE)
    position_K = first_tile * TILE + tokens_K
    block_K = tl.load(table_ptr + position_K // L, mask=position_K < context, other=0)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if (split > 0) & (first_tile >= num_tiles):
        return

    rows_M = tl.arange(0, M)
    dims_D = tl.arange(0, BLOCK_D)
    q_row = sequence.to(tl.int64) * N + head * GROUP
    q_MD = tl.load(
        q_ptr + q_row * D + rows_M[:, None] * D + dims_D[None, :],
        mask=(rows_M[:, None] < GROUP) & (dims_D[None, :] < D),
        other=0.0,
    )
    head_D = head * D + dims_D
    whole = chunks_per_program >= num_chunks

    m_M = tl.full([M], float("-inf"), tl.float32)
    l_M = tl.zeros([M], tl.float32)
    acc_MD = tl.zeros([M, BLOCK_D], tl.float32)
    chunk_m_M = tl.full([M], float("-inf"), tl.float32)
    chunk_l_M = tl.zeros([M], tl.float32)
    chunk_acc_MD = tl.zeros([M, BLOCK_D], tl.float32)
    for tile in range(first_tile, last_tile):
        position_K = tile * TILE + tokens_K
        there_K = position_K < context
        row_K = block_K.to(tl.int64) * L + position_K % L
        offsets_KD = row_K[:, None] * (G * D) + head_D[None, :]
        there_KD = there_K[:, None] & (dims_D[None, :] < D)
        k_KD = tl.load(k_ptr + offsets_KD, mask=there_KD, other=0.0)
        v_KD = tl.load(v_ptr + offsets_KD, mask=there_KD, other=0.0)
        # A tile ahead, so that the pipelined loads of keys and values need not wait for it.
        next_K = position_K + TILE
        block_K = tl.load(table_ptr + next_K // L, mask=next_K < context, other=0)

        scores_MK = tl.dot(q_MD, k_KD.to(q_MD.dtype).T, input_precision="ieee") * qk_scale
        scores_MK = tl.where(there_K[None, :], scores_MK, float("-inf"))
        starts_chunk = tile % tiles_per_chunk == 0
        old_m_M = tl.where(starts_chunk, float("-inf"), chunk_m_M)
        chunk_m_M = tl.maximum(old_m_M, tl.max(scores_MK, axis=1))
        old_M = tl.exp2(old_m_M - chunk_m_M)
        p_MK = tl.exp2(scores_MK - chunk_m_M[:, None])
        chunk_l_M = tl.fma(chunk_l_M, old_M, tl.sum(p_MK, axis=1))
        chunk_acc_MD = tl.dot(
            p_MK.to(q_MD.dtype),
            v_KD.to(q_MD.dtype),
            chunk_acc_MD * old_M[:, None],
            input_precision="ieee",
        )
        if ((tile + 1) % tiles_per_chunk == 0) | (tile + 1 == num_tiles):
            # Nested, because one condition is the compiler's and the other the device's.
            if SPLIT:  # noqa: SIM102
                if not whole:
                    pair = (sequence * G + head).to(tl.int64)
                    chunk = pair * MAX_CHUNKS + tile // tiles_per_chunk
                    tl.store(
                        partial_ptr + chunk * (R * D) + rows_M[:, None] * D + dims_D[None, :],
                        chunk_acc_MD,
                        mask=(rows_M[:, None] < R) & (dims_D[None, :] < D),
                    )
                    stats = stats_ptr + chunk * (2 * R) + rows_M
                    tl.store(stats, chunk_m_M, mask=rows_M < R)
                    tl.store(stats + R, chunk_l_M, mask=rows_M < R)
            m_M, l_M, acc_MD = _fold(m_M, l_M, acc_MD, chunk_m_M, chunk_l_M, chunk_acc_MD)

    if whole:
        _store_output(out_ptr, sequence, head, l_M, acc_MD, v_scale, N, GROUP, D, M, BLOCK_D)
    elif SPLIT and LAST_ARRIVER:
        # All threads' stores come before the one thread's atomic; its release covers them.
        tl.debug_barrier()
        pair = sequence * G + head
        num_programs = tl.cdiv(num_chunks, chunks_per_program)
        arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == num_programs - 1:
            tl.store(arrivals_ptr + pair, 0)
            l_R, acc_RD = _merge(
                partial_ptr, stats_ptr, pair, num_chunks, D, R, BLOCK_D, MAX_CHUNKS, UNROLL
            )
            _store_output(out_ptr, sequence, head, l_R, acc_RD, v_scale, N, GROUP, D, R, BLOCK_D)


@triton.jit(do_not_specialize=["num_splits", "min_tokens"])
def _merge_kernel(
    partial_ptr,
    stats_ptr,
    context_ptr,
    out_ptr,
    num_splits,
    min_tokens,
    v_scale,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Fold the chunks that several programs of `_decode_kernel` left; shapes as there.

    Grid: (G, S).
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    context = tl.load(context_ptr + sequence)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    _, _, num_chunks = _cut(context, TILE, MAX_CHUNKS)
    if _chunks_per_program(context, num_chunks, num_splits, min_tokens) >= num_chunks:
        return
    pair = sequence * G + head
    l_R, acc_RD = _merge(
        partial_ptr, stats_ptr, pair, num_chunks, D, R, BLOCK_D, MAX_CHUNKS, UNROLL
    )
    _store_output(out_ptr, sequence, head, l_R, acc_RD, v_scale, N, N // G, D, R, BLOCK_D)


def paged_decode(
    q_SND: torch.Tensor,
    k_cache_BLGD: torch.Tensor,
    v_cache_BLGD: torch.Tensor,
    block_tables_SB: torch.Tensor,
    context_lens_S: torch.Tensor,
    scale: float,
    out_SND: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    tiles: DecodeTiles | None = None,
    launch: DecodeLaunch | None = None,
    last_arriver: bool = True,
    use_pdl: bool = False,
) -> None:
    """Attend each sequence's one query to its context, into ``out_SND``.

    The arguments are checked by the caller: q and out contiguous, of one dtype; caches contiguous,
    of that dtype or float8_e4m3fn; tables int32 with columns side by side; contexts int32, where 0
    gives zeros. Cache entries outside the contexts are not used, whatever they hold.

    Args:
        scale: factor on the scores.
        k_scale, v_scale: what the cached keys and values are multiplied by.
        tiles, launch: None: the committed ones.
        last_arriver: merge in the last program that finishes (for which the first call must come
            before any capture of a CUDA graph), else in a second kernel.
        use_pdl: launch before the preceding kernel has ended (compute capability 9 and above);
            tables and contexts are then read without waiting.
    """
    num_sequences, num_heads, head_dim = q_SND.shape
    block_size, num_kv_heads = k_cache_BLGD.shape[1:3]
    if num_sequences == 0:
        return
    num_pairs = num_sequences * num_kv_heads
    tiles = tiles or decode_tiles(head_dim, k_cache_BLGD.dtype)
    launch = launch or decode_launch(num_pairs)
    split = launch.num_splits > 1
    rows = triton.next_power_of_2(num_heads // num_kv_heads)
    shape = {
        "N": num_heads,
        "G": num_kv_heads,
        "D": head_dim,
        "R": rows,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "TILE": tiles.tile,
        "MAX_CHUNKS": tiles.max_chunks,
        "UNROLL": launch.merge_unroll,
        "USE_PDL": use_pdl,
        "num_warps": tiles.num_warps,
        "launch_pdl": use_pdl,
    }
    # Not used where nothing is split; a kernel's pointer has to point somewhere.
    partials = stats = arrivals = out_SND
    if split:
        chunks = num_pairs * tiles.max_chunks
        partials, stats = torch.empty(
            chunks * rows * (head_dim + 2), dtype=torch.float32, device=q_SND.device
        ).split([chunks * rows * head_dim, chunks * rows * 2])
        if last_arriver:
            arrivals = arrival_counters(q_SND.device)
    _decode_kernel[(num_kv_heads, num_sequences, launch.num_splits)](
        q_SND,
        k_cache_BLGD,
        v_cache_BLGD,
        block_tables_SB,
        context_lens_S,
        out_SND,
        partials,
        stats,
        arrivals,
        block_tables_SB.stride(0),
        launch.num_splits,
        launch.min_tokens,
        scale * k_scale * LOG2_E,
        v_scale,
        L=block_size,
        SPLIT=split,
        LAST_ARRIVER=last_arriver,
        num_stages=launch.num_stages,
        **shape,
    )
    if split and not last_arriver:
        _merge_kernel[(num_kv_heads, num_sequences)](
            partials,
            stats,
            context_lens_S,
            out_SND,
            launch.num_splits,
            launch.min_tokens,
            v_scale,
            **shape,
        )
