"""Sorting (row, choice) pairs by expert, without a count coming back to the host.

Few pairs take one launch, in which every expert's program reads all of them. Many take two: the
experts of each chunk of pairs are counted; then every chunk knows from the counts of those before
it where its pairs go.

Legend: P pairs (pair r * K + k is choice k of row r), E experts, R ranges of pairs, C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import launch_kernel, supports_pdl

# Pairs of a range that a program looks at together; a warp's 32 lanes take four each.
BLOCK = 128
# (pairs up to, ranges, warps) of the one launch: a short list in one step, a long one in several.
SHAPES = ((512, 4, 4), (4096, 32, 8))
# Beyond: at most so many chunks, whose counts every program of the second launch reads, many at
# once: for 65,536 pairs and 128 experts on an H200, the two launches take 19 us, 36 with a quarter.
MAX_CHUNKS = 256
COUNTED_EXPERTS = 64
COUNTS_AT_ONCE = 8192


@triton.jit(do_not_specialize=["num_pairs"])
def _group_kernel(
    ids_ptr,
    offsets_ptr,
    pairs_ptr,
    num_pairs,
    num_experts,
    NUM_STEPS: tl.constexpr,
    NUM_RANGES: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program e: where the pairs of expert e start, and the pairs themselves in increasing order.

    Every program reads all ids, twice if they are many; that is cheaper than one more launch.
    The pairs are cut into NUM_RANGES ranges of NUM_STEPS * BLOCK, which are walked side by side:
    a range counts on from where the ranges before it end.

    Shapes: ids int32 [P], below 0 for no expert; offsets int32 [E + 1]; pairs int32 [P].

    Example, E = 3, ids = [2, 0, -1, 2]: offsets = [0, 1, 1, 3], pairs = [1, 0, 3, unwritten].
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    expert = tl.program_id(0)
    starts_R1 = (tl.arange(0, NUM_RANGES) * NUM_STEPS * BLOCK)[:, None]
    columns_1B = tl.arange(0, BLOCK)[None, :]

    equal_RB = tl.zeros([NUM_RANGES, BLOCK], tl.int32)
    below_RB = tl.zeros([NUM_RANGES, BLOCK], tl.int32)
    for step in range(NUM_STEPS):
        positions_RB = starts_R1 + step * BLOCK + columns_1B
        ids_RB = tl.load(ids_ptr + positions_RB, mask=positions_RB < num_pairs, other=-1)
        equal_RB += (ids_RB == expert).to(tl.int32)
        below_RB += ((ids_RB >= 0) & (ids_RB < expert)).to(tl.int32)
    equal_R = tl.sum(equal_RB, axis=1)
    first = tl.sum(tl.sum(below_RB, axis=1), axis=0)
    tl.store(offsets_ptr + expert, first)
    if expert == num_experts - 1:
        tl.store(offsets_ptr + num_experts, first + tl.sum(equal_R, axis=0))

    next_R = first + tl.cumsum(equal_R, axis=0) - equal_R
    for step in range(NUM_STEPS):
        positions_RB = starts_R1 + step * BLOCK + columns_1B
        ids_RB = tl.load(ids_ptr + positions_RB, mask=positions_RB < num_pairs, other=-1)
        is_equal_RB = ids_RB == expert
        equal_RB = is_equal_RB.to(tl.int32)
        targets_RB = next_R[:, None] + tl.cumsum(equal_RB, axis=1) - equal_RB
        tl.store(pairs_ptr + targets_RB, positions_RB, mask=is_equal_RB)
        next_R += tl.sum(equal_RB, axis=1)


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(
    ids_ptr,
    counts_ptr,
    num_pairs,
    num_experts,
    NUM_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (chunk, block): how many pairs of the chunk have each of BLOCK_E experts.

    Shapes: ids int32 [P]; counts int32 [C, E]. A chunk is NUM_STEPS * BLOCK pairs.

    Example, E = 2, chunks of 4: ids = [1, -1, 1, 0, 0] give counts = [[1, 2], [1, 0]].
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    chunk = tl.program_id(0)
    experts_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    counts_E = tl.zeros([BLOCK_E], tl.int32)
    for step in range(NUM_STEPS):
        pairs_B = (chunk * NUM_STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        ids_B = tl.load(ids_ptr + pairs_B, mask=pairs_B < num_pairs, other=-1)
        counts_E += tl.sum((ids_B[:, None] == experts_E[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + chunk * num_experts + experts_E, counts_E, mask=experts_E < num_experts)


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])
def _place_kernel(
    ids_ptr,
    counts_ptr,
    next_ptr,
    offsets_ptr,
    pairs_ptr,
    num_pairs,
    num_experts,
    num_chunks,
    NUM_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_E: tl.constexpr,
    CHUNKS_AT_ONCE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program c: put the pairs of chunk c behind those of the experts and chunks before them.

    Shapes as in the other kernels; next int32 [C, E] is scratch, where the next pair of an expert
    goes.

    Example, as for `_count_kernel`: the experts start at 0 and 2; chunk 0 begins there, chunk 1 at
    1 and 4; offsets = [0, 2, 4], pairs = [3, 4, 0, 2, unwritten].
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    chunk = tl.program_id(0)
    experts_E = tl.arange(0, PADDED_E)
    is_expert_E = experts_E < num_experts
    total_E = tl.zeros([PADDED_E], tl.int32)
    before_E = tl.zeros([PADDED_E], tl.int32)
    for first in range(0, num_chunks, CHUNKS_AT_ONCE):
        chunks_C1 = (first + tl.arange(0, CHUNKS_AT_ONCE))[:, None]
        counts_CE = tl.load(
            counts_ptr + chunks_C1 * num_experts + experts_E[None, :],
            mask=(chunks_C1 < num_chunks) & is_expert_E[None, :],
            other=0,
        )
        total_E += tl.sum(counts_CE, axis=0)
        before_E += tl.sum(tl.where(chunks_C1 < chunk, counts_CE, 0), axis=0)
    starts_E = tl.cumsum(total_E, axis=0) - total_E
    if chunk == 0:
        tl.store(offsets_ptr + experts_E, starts_E, mask=is_expert_E)
        tl.store(offsets_ptr + num_experts, tl.sum(total_E, axis=0))

    next_ptr += chunk * num_experts
    tl.store(next_ptr + experts_E, starts_E + before_E, mask=is_expert_E)
    lanes_B = tl.arange(0, BLOCK)
    for step in range(NUM_STEPS):
        first = (chunk * NUM_STEPS + step) * BLOCK
        pairs_B = first + lanes_B
        ids_B = tl.load(ids_ptr + pairs_B, mask=pairs_B < num_pairs, other=-1)
        is_earlier_BB = (ids_B[:, None] == ids_B[None, :]) & (lanes_B[None, :] < lanes_B[:, None])
        num_earlier_B = tl.sum(is_earlier_BB.to(tl.int32), axis=1)
        tl.debug_barrier()  # what was stored below or above is there
        next_B = tl.load(next_ptr + ids_B, mask=ids_B >= 0, other=0, cache_modifier=".cg")
        tl.store(pairs_ptr + next_B + num_earlier_B, pairs_B, mask=ids_B >= 0)
        tl.debug_barrier()  # and has been read
        tl.atomic_add(next_ptr + ids_B, 1, mask=ids_B >= 0, sem="relaxed")


def group_by_expert(ids_P: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets int32 [E + 1] and pairs int32 [P] of contiguous int32 ids, as the kernel says."""
    (num_pairs,) = ids_P.shape
    offsets_E1 = torch.empty(num_experts + 1, dtype=torch.int32, device=ids_P.device)
    pairs_P = torch.empty(num_pairs, dtype=torch.int32, device=ids_P.device)
    use_pdl = supports_pdl(ids_P.device)
    shape = next((shape for shape in SHAPES if num_pairs <= shape[0]), None)
    if shape is None:
        _group_many(ids_P, offsets_E1, pairs_P, use_pdl)
        return offsets_E1, pairs_P
    _, num_ranges, num_warps = shape
    launch_kernel(
        _group_kernel,
        (num_experts,),
        ids_P,
        offsets_E1,
        pairs_P,
        num_pairs,
        num_experts,
        # A power of two, because each value is another compilation.
        NUM_STEPS=triton.next_power_of_2(triton.cdiv(num_pairs, num_ranges * BLOCK)),
        NUM_RANGES=num_ranges,
        BLOCK=BLOCK,
        USE_PDL=use_pdl,
        num_warps=num_warps,
        launch_pdl=use_pdl,
    )
    return offsets_E1, pairs_P


def _group_many(
    ids_P: torch.Tensor, offsets_E1: torch.Tensor, pairs_P: torch.Tensor, use_pdl: bool
) -> None:
    """Two launches, for which a chunk's pairs are few and the chunks are not many."""
    num_pairs, num_experts = len(ids_P), len(offsets_E1) - 1
    # A power of two, because each value is another compilation.
    num_steps = triton.next_power_of_2(triton.cdiv(num_pairs, MAX_CHUNKS * BLOCK))
    num_chunks = triton.cdiv(num_pairs, num_steps * BLOCK)
    counts_CE = torch.empty(num_chunks, num_experts, dtype=torch.int32, device=ids_P.device)
    options = {
        "NUM_STEPS": num_steps,
        "BLOCK": BLOCK,
        "USE_PDL": use_pdl,
        "launch_pdl": use_pdl,
    }
    padded_experts = triton.next_power_of_2(num_experts)
    block_e = min(COUNTED_EXPERTS, padded_experts)
    launch_kernel(
        _count_kernel,
        (num_chunks, triton.cdiv(num_experts, block_e)),
        ids_P,
        counts_CE,
        num_pairs,
        num_experts,
        BLOCK_E=block_e,
        num_warps=4,
        **options,
    )
    launch_kernel(
        _place_kernel,
        (num_chunks,),
        ids_P,
        counts_CE,
        torch.empty_like(counts_CE),
        offsets_E1,
        pairs_P,
        num_pairs,
        num_experts,
        num_chunks,
        PADDED_E=padded_experts,
        CHUNKS_AT_ONCE=max(1, min(MAX_CHUNKS, COUNTS_AT_ONCE // padded_experts)),
        num_warps=4,
        **options,
    )
