"""Decode attention over a paged KV cache: one new token per sequence, from the fused projection on.

Legend: S sequences, N query heads, G KV heads, D head dimension, F = D / 2, P positions, B blocks,
L tokens a block, X = (N + 2 × G) × D, R query heads of a KV head (N / G) padded to a power of two,
M rows of the matrix products (R, at least 16), A heads that a program prepares.

Memory-bound: a step reads every cached key and value once. Split-KV attention (flash-decoding,
https://pytorch.org/blog/flash-decoding): a context is cut into at most MAX_CHUNKS chunks of whole
tiles, by its length alone (`paged_decode_chunks`). A chunk is attended to by itself, and the
chunks' results are folded in order. How many programs share the chunks depends on the launch, but
not what is computed: a sequence's output has the same bits alone, in any batch and in any bucket of
a CUDA graph.

A program can prepare the queries that it needs itself, which saves a launch: reading the
projection's row again is nothing beside the cache. The new key and value belong to the program that
attends to the end of the context, and ride along in the tile of the queries, which has room for
them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .floats import LOG2_E
from .launch import arrival_counters, launch_kernel, prefetch_to_l2
from .norm_rope import load_norm_weights, prepare_heads, write_cache
from .paged_decode_chunks import (
    count_chunks_per_program,
    cut,
    fold,
    head_dims,
    merge,
    merge_kernel,
    store_output,
)
from .paged_decode_table import DecodeLaunch, DecodeTiles, decode_launch, decode_tiles


@triton.jit
def _prefetch_cache(
    k_ptr,
    v_ptr,
    table_ptr,
    head,
    first,
    end,
    G: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
):
    """Call the keys and values of up to NUM_TOKENS positions, first .. end - 1, into L2.

    Shapes: k and v [B, L, G, D]; table int32, of this sequence. Example, NUM_TOKENS = 4, first 0,
    end 3, D = 128 in bfloat16: positions 0, 1, 2 and 2, of each 2 lines of keys and 2 of values.
    """
    LINE: tl.constexpr = 1024 // k_ptr.dtype.element_ty.primitive_bitwidth
    NUM_LINES: tl.constexpr = (BLOCK_D + LINE - 1) // LINE
    # Those past the end call the last one again.
    position_K = tl.minimum(first + tl.arange(0, NUM_TOKENS), end - 1)
    block_K = tl.load(table_ptr + position_K // L)
    row_K = (block_K.to(tl.int64) * L + position_K % L) * G + head
    offsets_KC = row_K[:, None] * D + tl.minimum(tl.arange(0, NUM_LINES) * LINE, D - 1)[None, :]
    prefetch_to_l2(k_ptr + offsets_KC)
    prefetch_to_l2(v_ptr + offsets_KC)


@triton.jit
def _joined(first_AF, second_AF, A: tl.constexpr, M: tl.constexpr, BLOCK_F: tl.constexpr):
    """The first M of A = M or 2 * M heads, their halves one after the other: [M, 2 * BLOCK_F]."""
    heads_AD = tl.permute(tl.join(first_AF, second_AF), (0, 2, 1)).reshape(A, 2 * BLOCK_F)
    if A > M:
        heads_AD, _ = tl.split(tl.permute(heads_AD.reshape(2, M, 2 * BLOCK_F), (1, 2, 0)))
    return heads_AD


@triton.jit(do_not_specialize=["qkv_part_stride", "block_table_stride", "num_splits", "min_tokens"])
def _decode_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    context_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    arrivals_ptr,
    qkv_stride,
    qkv_part_stride,
    block_table_stride,
    num_splits,
    min_tokens,
    eps,
    qk_scale,
    v_scale,
    N: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TILE: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
    LAST_ARRIVER: tl.constexpr,
    NUM_PREFETCHED: tl.constexpr,
    PREPARE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Attend the query heads of one KV head to one program's share of a context.

    With PREPARE, queries, keys and values are made of the fused projection, see `prepare_heads`;
    else qkv holds queries [S, N * D], and the cache all keys and values.

    Shapes: qkv [S, X] with a row stride, or float32 [NUM_PARTS, S, X] to be summed; weights [D];
    cos and sin [P, F]; position and slot int64 [S]; k and v [B, L, G, D]; block_table int32
    [S, ...] with a row stride; context int32 [S]; out [S, N, D]; partial float32
    [S * G, MAX_CHUNKS, R, D]; stats float32 [S * G, MAX_CHUNKS, 2, R]; arrivals int32 [S * G], zero
    before and after the launch.
    Grid: (G, S, num_splits).

    Example, N = G = 1, scale 1, and queries, keys and values that differ in one dimension only,
    where the prepared query is 1, the keys are [0, ln 3], the latter new, and the values [1, 5]:
    the weights are 1/4 and 3/4, the output is 4. With a chunk a key, the partials are (m, l, acc) =
    (0, 1, 1) and (log2 3, 1, 5), which `merge_kernel` goes on with.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    D: tl.constexpr = 2 * F
    BLOCK_D: tl.constexpr = 2 * BLOCK_F
    GROUP: tl.constexpr = N // G
    # The dot's M dimension is at least 16.
    M: tl.constexpr = 16 if R < 16 else R

    # Step inputs: complete before the embedding let others begin, so there is no wait for them.
    context = tl.load(context_ptr + sequence)
    num_tiles, tiles_per_chunk, num_chunks = cut(context, TILE, MAX_CHUNKS)
    chunks_per_program = num_chunks
    if SPLIT:
        chunks_per_program = count_chunks_per_program(context, num_chunks, num_splits, min_tokens)
    first_tile = split * chunks_per_program * tiles_per_chunk
    last_tile = tl.minimum(first_tile + chunks_per_program * tiles_per_chunk, num_tiles)
    if (split > 0) & (first_tile >= num_tiles):
        # Without waiting: the programs of split 0 do, so the launch still ends after those before.
        return
    table_ptr = block_table_ptr + sequence.to(tl.int64) * block_table_stride
    tokens_K = tl.arange(0, TILE)
    position_K = first_tile * TILE + tokens_K
    block_K = tl.load(table_ptr + position_K // L, mask=position_K < context, other=0)
    if PREPARE:
        half_F = tl.arange(0, BLOCK_F)[None, :]
        angle_F = tl.load(position_ptr + sequence) * F + half_F
        cos_F = tl.load(cos_ptr + angle_F, mask=half_F < F, other=0.0).to(tl.float32)
        sin_F = tl.load(sin_ptr + angle_F, mask=half_F < F, other=0.0).to(tl.float32)
        weights = load_norm_weights(q_weight_ptr, k_weight_ptr, F, BLOCK_F)
        slot = tl.load(slot_ptr + sequence)
    # Nested, because one condition is the compiler's and the other the device's.
    if USE_PDL and NUM_PREFETCHED > 0:  # noqa: SIM102
        if first_tile < last_tile:
            # Whether it is there already or not: L2 is where all stores arrive.
            _prefetch_cache(
                k_ptr, v_ptr, table_ptr, head, first_tile * TILE,
                tl.minimum(last_tile * TILE, context), G, D, L, BLOCK_D, NUM_PREFETCHED * TILE,
            )  # fmt: skip
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    rows_M = tl.arange(0, M)
    dims_D, in_head_D = head_dims(F, BLOCK_F)
    token_ptr = qkv_ptr + sequence.to(tl.int64) * qkv_stride
    if PREPARE:
        # The group's queries, then its key and its value.
        rows_A = tl.arange(0, A)
        head_A = tl.where(rows_A < GROUP, head * GROUP + rows_A, N + head + (rows_A - GROUP) * G)
        has_end = last_tile == num_tiles
        there_A = (rows_A < GROUP) | (has_end & (rows_A < GROUP + 2))
        first_AF, second_AF = prepare_heads(
            token_ptr, qkv_part_stride, head_A, there_A, cos_F, sin_F, weights, eps, N, G, F,
            BLOCK_F, NUM_PARTS, out_ptr.dtype.element_ty,
        )  # fmt: skip
        # Through memory, so that the loop need not know about the new key and value. Where they are
        # not there yet, this program alone reads them: the barrier orders its threads' stores
        # before all of its loads of the cache, also the asynchronous ones, and its
        # multiprocessor's L1 cache holds nothing older than its stores.
        write_cache(k_ptr, v_ptr, slot, head_A, there_A, first_AF, second_AF, N, G, F, BLOCK_F)
        if has_end:
            tl.debug_barrier()
        # Rows past the group's, the key and the value among them, are computed but not used.
        q_MD = _joined(first_AF, second_AF, A, M, BLOCK_F).to(out_ptr.dtype.element_ty)
    else:
        q_MD = tl.load(
            token_ptr + (head * GROUP + rows_M[:, None]) * D + dims_D[None, :],
            mask=(rows_M[:, None] < GROUP) & in_head_D[None, :],
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
        there_KD = there_K[:, None] & in_head_D[None, :]
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
            # Nested, as above.
            if SPLIT:  # noqa: SIM102
                if not whole:
                    pair = (sequence * G + head).to(tl.int64)
                    chunk = pair * MAX_CHUNKS + tile // tiles_per_chunk
                    tl.store(
                        partial_ptr + chunk * (R * D) + rows_M[:, None] * D + dims_D[None, :],
                        chunk_acc_MD,
                        mask=(rows_M[:, None] < R) & in_head_D[None, :],
                    )
                    stats = stats_ptr + chunk * (2 * R) + rows_M
                    tl.store(stats, chunk_m_M, mask=rows_M < R)
                    tl.store(stats + R, chunk_l_M, mask=rows_M < R)
            m_M, l_M, acc_MD = fold(m_M, l_M, acc_MD, chunk_m_M, chunk_l_M, chunk_acc_MD)

    if whole:
        store_output(out_ptr, sequence, head, l_M, acc_MD, v_scale, N, GROUP, F, M, BLOCK_F)
    elif SPLIT and LAST_ARRIVER:
        # All threads' stores come before the one thread's atomic; its release covers them.
        tl.debug_barrier()
        pair = sequence * G + head
        num_programs = tl.cdiv(num_chunks, chunks_per_program)
        arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == num_programs - 1:
            tl.store(arrivals_ptr + pair, 0)
            l_R, acc_RD = merge(
                partial_ptr, stats_ptr, pair, num_chunks, F, R, BLOCK_F, MAX_CHUNKS, UNROLL
            )
            store_output(out_ptr, sequence, head, l_R, acc_RD, v_scale, N, GROUP, F, R, BLOCK_F)


def paged_decode(
    q_SND: torch.Tensor,
    k_cache_BLGD: torch.Tensor,
    v_cache_BLGD: torch.Tensor,
    block_tables_SB: torch.Tensor,
    context_lens_S: torch.Tensor,
    scale: float,
    out_SND: torch.Tensor,
    *,
    prepare: tuple[torch.Tensor, ...] | None = None,
    eps: float = 0.0,
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
        q_SND: the queries; with ``prepare`` instead the fused projection [S, X], whose rows may lie
            apart, or contiguous float32 parts of it [parts, S, X].
        scale: factor on the scores.
        prepare: make queries, keys and values as `norm_rope_write` does, from its arguments
            ``(q_weight_D, k_weight_D, cos_PF, sin_PF, positions_S, slots_S)``. A slot is the last
            position of its context; with a context of 0 it is -1, or where the row's key and value
            are already. No sequence may have another's slot in its context, unless the same is
            there already, because nothing orders the one's store before the other's load.
        eps: of the norms.
        k_scale, v_scale: what the cached keys and values are multiplied by; new ones are written
            as they are.
        tiles, launch: None: the committed ones.
        last_arriver: merge in the last program that finishes (for which the first call must come
            before any capture of a CUDA graph), else in a second kernel.
        use_pdl: launch before the preceding kernel has ended (compute capability 9 and above);
            everything but ``q_SND`` and the caches is then read without waiting.
    """
    num_sequences, num_heads, head_dim = out_SND.shape
    block_size, num_kv_heads = k_cache_BLGD.shape[1:3]
    if num_sequences == 0:
        return
    num_pairs = num_sequences * num_kv_heads
    tiles = tiles or decode_tiles(head_dim, k_cache_BLGD.dtype)
    launch = launch or decode_launch(num_pairs)
    split = launch.num_splits > 1
    group = num_heads // num_kv_heads
    rows = triton.next_power_of_2(group)
    # Four heads a warp, as in every launch of `norm_rope_write`: the squares of a head then lie in
    # the same lanes there and here, and add up to the same bits.
    num_prepared = max(triton.next_power_of_2(group + 2), 4 * tiles.num_warps)
    shape = {
        "N": num_heads,
        "G": num_kv_heads,
        "F": head_dim // 2,
        "R": rows,
        "BLOCK_F": triton.next_power_of_2(head_dim // 2),
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
            chunks * rows * (head_dim + 2), dtype=torch.float32, device=out_SND.device
        ).split([chunks * rows * head_dim, chunks * rows * 2])
        if last_arriver:
            arrivals = arrival_counters(out_SND.device)
    is_split = prepare is not None and q_SND.dim() == 3
    launch_kernel(
        _decode_kernel,
        (num_kv_heads, num_sequences, launch.num_splits),
        q_SND,
        *(prepare or [out_SND] * 6),
        k_cache_BLGD,
        v_cache_BLGD,
        block_tables_SB,
        context_lens_S,
        out_SND,
        partials,
        stats,
        arrivals,
        q_SND.stride(1 if is_split else 0),
        q_SND.stride(0),
        block_tables_SB.stride(0),
        launch.num_splits,
        launch.min_tokens,
        eps,
        scale * k_scale * LOG2_E.value,
        v_scale,
        L=block_size,
        A=min(num_prepared, 2 * max(16, rows)),
        SPLIT=split,
        LAST_ARRIVER=last_arriver,
        NUM_PREFETCHED=launch.num_prefetched if prepare else 0,
        PREPARE=prepare is not None,
        NUM_PARTS=len(q_SND) if is_split else 1,
        num_stages=launch.num_stages,
        **shape,
    )
    if split and not last_arriver:
        launch_kernel(
            merge_kernel,
            (num_kv_heads, num_sequences),
            partials,
            stats,
            context_lens_S,
            out_SND,
            launch.num_splits,
            launch.min_tokens,
            v_scale,
            **shape,
        )
