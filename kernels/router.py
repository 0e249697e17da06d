"""The router: gate matmul, softmax, top-k and normalisation in one launch.

Legend: T tokens, E experts, H hidden size, K experts per token, S chunks of the hidden dimension.

A logit is the sum of S partial sums, one per chunk of `_chunk_size` columns, added in order; both
kernels do exactly that, so a token's experts and weights are the same bits from either of them.

- Few tokens: reading the gate matrix is the work, so it is spread over (expert block, chunk)
  programs, which load their piece before they wait for the tokens. Each leaves its partial logits
  in a workspace, and the last program of a token tile to arrive adds them up and selects.
- Many tokens: a program holds all logits of its tokens, and selects in its epilogue.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import (
    COUNTERS_PER_STREAM,
    arrival_counters,
    launch_kernel,
    prefetch_to_l2,
    supports_pdl,
)
from .top_k import MAX_LOGITS, select_top_k, store_padding

# Up to this many tokens the gate matrix is split among programs.
SPLIT_MAX_TOKENS = 512
SPLIT_BLOCK_T = 16
SPLIT_BLOCK_E = 64
# (tokens up to, tokens a program) of the other kernel: programs for about every multiprocessor.
WHOLE_BLOCK_T = ((2048, 16), (4096, 32))
WHOLE_LARGEST_BLOCK_T = 64
# Sixteen warps: each selects the experts of one token of 16, one of four tokens of 64.
NUM_WARPS = 16

assert SPLIT_MAX_TOKENS // SPLIT_BLOCK_T <= COUNTERS_PER_STREAM


@triton.jit(do_not_specialize=["num_rows"])
def _split_kernel(
    x_ptr,
    gate_ptr,
    num_tokens_ptr,
    partial_ptr,
    counters_ptr,
    ids_ptr,
    weights_ptr,
    num_rows,
    num_experts,
    hidden,
    x_row_stride,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PADDED_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (part, tile): the logits of BLOCK_T tokens and BLOCK_E experts over one chunk.

    Shapes: x [T, H] with a row stride; gate [E, H]; partial float32 [S, T, PADDED_E]; counters
    int32, one a tile, zero before and after; ids int32 and weights float32 [T, TOP_K];
    num_tokens int32 [1], of how many rows are tokens.

    Example: H = 2048 in chunks of 256, E = 128 in blocks of 64: 8 x 2 = 16 parts. Of a tile's 16
    programs, the one that finds its counter at 15 adds partial[0] + ... + partial[7] and selects.
    """
    part = tl.program_id(0)
    tile = tl.program_id(1)
    first_column = (part % NUM_CHUNKS) * CHUNK
    rows_T = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    experts_E = (part // NUM_CHUNKS) * BLOCK_E + tl.arange(0, BLOCK_E)
    if USE_PDL:
        # The gate matrix is no other kernel's output: its lines may come before the wait.
        ELEMENTS: tl.constexpr = 1024 // gate_ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = (CHUNK + ELEMENTS - 1) // ELEMENTS
        prefetch_to_l2(
            gate_ptr
            + tl.minimum(experts_E, num_experts - 1)[:, None] * hidden
            + tl.minimum(first_column + tl.arange(0, LINES) * ELEMENTS, hidden - 1)[None, :]
        )
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    num_real_rows = num_rows
    if HAS_NUM_TOKENS:
        num_real_rows = tl.load(num_tokens_ptr)

    if tile * BLOCK_T >= num_real_rows:
        if part == 0:
            store_padding(rows_T, num_rows, ids_ptr, weights_ptr, TOP_K, BLOCK_K)
    else:
        columns_1H = first_column + tl.arange(0, BLOCK_H)[None, :]
        x_TH = x_ptr + rows_T.to(tl.int64)[:, None] * x_row_stride + columns_1H
        gate_EH = gate_ptr + experts_E[:, None] * hidden + columns_1H
        logits_ET = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
        for first in range(0, CHUNK, BLOCK_H):
            in_row_1H = first + columns_1H < hidden
            gate = tl.load(
                gate_EH + first, mask=(experts_E < num_experts)[:, None] & in_row_1H, other=0.0
            )
            x = tl.load(x_TH + first, mask=(rows_T < num_real_rows)[:, None] & in_row_1H, other=0.0)
            logits_ET = tl.dot(gate, tl.trans(x), logits_ET, input_precision="ieee")
        partial_TE = partial_ptr + rows_T[:, None] * PADDED_E + experts_E[None, :]
        tl.store(
            partial_TE + (part % NUM_CHUNKS) * num_rows * PADDED_E,
            tl.trans(logits_ET),
            mask=(rows_T < num_rows)[:, None] & (experts_E < PADDED_E)[None, :],
        )
        # All threads have stored before one of them announces it.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if num_arrived == NUM_PARTS - 1:
            tl.store(counters_ptr + tile, 0)
            all_experts_1E = tl.arange(0, PADDED_E)[None, :]
            all_partial_TE = partial_ptr + rows_T[:, None] * PADDED_E + all_experts_1E
            logits_TE = tl.zeros([BLOCK_T, PADDED_E], tl.float32)
            for s in tl.static_range(NUM_CHUNKS):
                # Past the L1 cache, which may hold what was there before.
                logits_TE += tl.load(
                    all_partial_TE + s * num_rows * PADDED_E,
                    mask=(rows_T < num_rows)[:, None],
                    other=0.0,
                    cache_modifier=".cg",
                )
            select_top_k(
                logits_TE,
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


@triton.jit(do_not_specialize=["num_rows"])
def _whole_kernel(
    x_ptr,
    gate_ptr,
    num_tokens_ptr,
    logits_ptr,
    ids_ptr,
    weights_ptr,
    num_rows,
    num_experts,
    hidden,
    x_row_stride,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    PADDED_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (tile): all logits of BLOCK_T tokens, then the choice; shapes as in `_split_kernel`.

    logits is float32 scratch [T, PADDED_E].

    Example: H = 4, CHUNK = 2: logit = (x0 g0 + x1 g1) + (x2 g2 + x3 g3), the chunks' sums in order.
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    tile = tl.program_id(0)
    rows_T = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    num_real_rows = num_rows
    if HAS_NUM_TOKENS:
        num_real_rows = tl.load(num_tokens_ptr)

    if tile * BLOCK_T >= num_real_rows:
        store_padding(rows_T, num_rows, ids_ptr, weights_ptr, TOP_K, BLOCK_K)
    else:
        experts_E = tl.arange(0, PADDED_E)
        columns_1H = tl.arange(0, BLOCK_H)[None, :]
        x_TH = x_ptr + rows_T.to(tl.int64)[:, None] * x_row_stride + columns_1H
        gate_EH = gate_ptr + experts_E[:, None] * hidden + columns_1H
        total_ET = tl.zeros([PADDED_E, BLOCK_T], tl.float32)
        chunk_ET = tl.zeros([PADDED_E, BLOCK_T], tl.float32)
        for first in range(0, NUM_CHUNKS * CHUNK, BLOCK_H):
            in_row_1H = first + columns_1H < hidden
            gate = tl.load(
                gate_EH + first, mask=(experts_E < num_experts)[:, None] & in_row_1H, other=0.0
            )
            x = tl.load(x_TH + first, mask=(rows_T < num_real_rows)[:, None] & in_row_1H, other=0.0)
            chunk_ET = tl.dot(gate, tl.trans(x), chunk_ET, input_precision="ieee")
            ends_chunk = (first + BLOCK_H) % CHUNK == 0
            total_ET += tl.where(ends_chunk, chunk_ET, 0.0)
            chunk_ET = tl.where(ends_chunk, 0.0, chunk_ET)
        # Through memory, after which a row lies in one warp: the selection reduces rows over and
        # over, which in the layout of the matrix product would take all warps each time.
        logits_TE = logits_ptr + rows_T.to(tl.int64)[:, None] * PADDED_E + experts_E[None, :]
        in_batch_T1 = (rows_T < num_rows)[:, None]
        tl.store(logits_TE, tl.trans(total_ET), mask=in_batch_T1)
        tl.debug_barrier()
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


def route(
    x_TH: torch.Tensor,
    gate_EH: torch.Tensor,
    top_k: int,
    normalize: bool,
    num_tokens_1: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int32 and weights float32, both [T, top_k]; the arguments are checked by the caller."""
    num_rows, hidden = x_TH.shape
    num_experts = gate_EH.shape[0]
    ids_TK = torch.empty(num_rows, top_k, dtype=torch.int32, device=x_TH.device)
    weights_TK = torch.empty(num_rows, top_k, dtype=torch.float32, device=x_TH.device)
    if num_rows == 0:
        return ids_TK, weights_TK
    if x_TH.stride(1) != 1:
        x_TH = x_TH.contiguous()
    chunk = _chunk_size(hidden)
    num_chunks = triton.cdiv(hidden, chunk)
    padded_experts = max(16, triton.next_power_of_2(num_experts))
    outputs = (ids_TK, weights_TK, num_rows, num_experts, hidden, x_TH.stride(0))
    use_pdl = supports_pdl(x_TH.device)
    options = {
        "TOP_K": top_k,
        "NORMALIZE": normalize,
        "HAS_NUM_TOKENS": num_tokens_1 is not None,
        "CHUNK": chunk,
        "NUM_CHUNKS": num_chunks,
        "PADDED_E": padded_experts,
        "BLOCK_K": triton.next_power_of_2(top_k),
        "USE_PDL": use_pdl,
        "launch_pdl": use_pdl,
        "num_warps": NUM_WARPS,
        # A line of the cache from each row at a time.
        "BLOCK_H": min(chunk, 128 // x_TH.element_size()),
    }
    if num_rows <= SPLIT_MAX_TOKENS:
        block_e = min(SPLIT_BLOCK_E, padded_experts)
        num_parts = num_chunks * (padded_experts // block_e)
        partial_STE = torch.empty(
            num_chunks, num_rows, padded_experts, dtype=torch.float32, device=x_TH.device
        )
        launch_kernel(
            _split_kernel,
            (num_parts, triton.cdiv(num_rows, SPLIT_BLOCK_T)),
            x_TH,
            gate_EH,
            num_tokens_1,
            partial_STE,
            arrival_counters(x_TH.device),
            *outputs,
            NUM_PARTS=num_parts,
            BLOCK_T=SPLIT_BLOCK_T,
            BLOCK_E=block_e,
            num_stages=5,
            # Without it the compiler saves registers by waiting for partial sums in three turns.
            maxnreg=64,
            **options,
        )
    else:
        block_t = _whole_block_t(num_rows, padded_experts)
        logits_TE = torch.empty(num_rows, padded_experts, dtype=torch.float32, device=x_TH.device)
        launch_kernel(
            _whole_kernel,
            (triton.cdiv(num_rows, block_t),),
            x_TH,
            gate_EH,
            num_tokens_1,
            logits_TE,
            *outputs,
            BLOCK_T=block_t,
            num_stages=2 if padded_experts > 256 else 4,
            **options,
        )
    return ids_TK, weights_TK


def _chunk_size(hidden: int) -> int:
    """Columns of one partial sum: about an eighth of a row, at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(triton.cdiv(hidden, 8)))


def _whole_block_t(num_rows: int, padded_experts: int) -> int:
    """Tokens a program of `_whole_kernel`."""
    fitting = max(16, MAX_LOGITS // padded_experts)
    wanted = next((block for limit, block in WHOLE_BLOCK_T if num_rows <= limit), None)
    return min(fitting, wanted or WHOLE_LARGEST_BLOCK_T)
