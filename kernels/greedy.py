"""Greedy sampling: the index of the largest logit of each row, in one launch and one read.

Legend: B rows, V vocabulary, S segments that a row is cut into.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .floats import LOWEST_KEY, keys_of
from .launch import COUNTERS_PER_STREAM, arrival_counters, launch_kernel, supports_pdl

# Logits that a program looks at together.
BLOCK = 2048
# Programs to aim at: as many as the multiprocessors hold, because each has little under way.
NUM_PROGRAMS = 2048
MAX_SEGMENTS = 128  # a power of two

_LARGEST_ID = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["blocks_per_segment", "num_segments"])
def _argmax_kernel(
    logits_ptr,
    partial_ptr,
    counters_ptr,
    tokens_ptr,
    vocab_size,
    row_stride,
    blocks_per_segment,
    num_segments,
    MAX_SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (segment, row): the best logit of a segment; the row's last one to arrive decides.

    Logits are compared through their keys (`kernels.floats`); NaN counts as -inf.

    Shapes: logits [B, V] of any float dtype with a row stride; partial int32 [B, 2, S], keys and
    ids; counters int32, one a row, zero before and after; tokens int64 [B].

    Example: logits = [NaN, 2, 5, 5] in two segments: (key of 2, id 1), (key of 5, id 2): 2.
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    segment = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    lanes = tl.arange(0, BLOCK)
    best_keys = tl.full([BLOCK], LOWEST_KEY, tl.int32)
    best_ids = tl.full([BLOCK], _LARGEST_ID, tl.int32)
    first = segment * blocks_per_segment * BLOCK
    for block in range(blocks_per_segment):
        ids = first + block * BLOCK + lanes
        in_row = ids < vocab_size
        logits = tl.load(row_ptr + ids, mask=in_row, other=float("-inf")).to(tl.float32)
        logits = tl.where(logits == logits, logits, float("-inf"))
        keys = tl.where(in_row, keys_of(logits), LOWEST_KEY)
        # Later blocks hold larger ids, which lose a tie.
        is_better = keys > best_keys
        best_keys = tl.where(is_better, keys, best_keys)
        best_ids = tl.where(is_better, ids, best_ids)
    key = tl.max(best_keys, axis=0)
    token = tl.min(tl.where(best_keys == key, best_ids, _LARGEST_ID), axis=0)

    if num_segments == 1:
        tl.store(tokens_ptr + row, token.to(tl.int64))
    else:
        partial_ptr += row * 2 * num_segments
        tl.store(partial_ptr + segment, key)
        tl.store(partial_ptr + num_segments + segment, token)
        # Both are stored before the arrival is announced.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel", scope="gpu")
        if num_arrived == num_segments - 1:
            tl.store(counters_ptr + row, 0)
            segments = tl.arange(0, MAX_SEGMENTS)
            exists = segments < num_segments
            # Past the L1 cache, which may hold what was there before.
            keys = tl.load(
                partial_ptr + segments, mask=exists, other=LOWEST_KEY, cache_modifier=".cg"
            )
            tokens = tl.load(
                partial_ptr + num_segments + segments,
                mask=exists,
                other=_LARGEST_ID,
                cache_modifier=".cg",
            )
            best = tl.max(keys, axis=0)
            token = tl.min(tl.where(keys == best, tokens, _LARGEST_ID), axis=0)
            tl.store(tokens_ptr + row, token.to(tl.int64))


def greedy_tokens(logits_BV: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """int64 [B] of ``logits_BV`` [B, V], V >= 1; the arguments are checked by the caller."""
    num_rows, vocab_size = logits_BV.shape
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int64, device=logits_BV.device)
    if num_rows == 0:
        return out
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    wanted = min(MAX_SEGMENTS, triton.cdiv(NUM_PROGRAMS, num_rows))
    if num_rows > COUNTERS_PER_STREAM:
        wanted = 1
    blocks_per_segment = triton.cdiv(num_blocks, min(wanted, num_blocks))
    num_segments = triton.cdiv(num_blocks, blocks_per_segment)
    partial_B2S = torch.empty(num_rows, 2, num_segments, dtype=torch.int32, device=logits_BV.device)
    use_pdl = supports_pdl(logits_BV.device)
    launch_kernel(
        _argmax_kernel,
        (num_segments, num_rows),
        logits_BV,
        partial_B2S,
        arrival_counters(logits_BV.device),
        out,
        vocab_size,
        logits_BV.stride(0),
        blocks_per_segment,
        num_segments,
        MAX_SEGMENTS=MAX_SEGMENTS,
        BLOCK=BLOCK,
        USE_PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
    return out
