"""Sorting (row, choice) pairs by expert, without a count coming back to the host.

Few pairs take one launch, in which every expert's program reads all of them. Many take two: the
experts of each chunk of pairs are counted; then every chunk knows from the counts of those before
it where its pairs go. Meanwhile it has ranked its pairs among those of the same expert.

Legend: P pairs (pair r * K + k is choice k of row r), E experts, R ranges of pairs; C chunks, or
the pairs of a chunk; S steps of B pairs in a chunk.
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
# (pairs up to, chunks) beyond: every program of the second launch reads the counts of all chunks,
# and ranks the pairs of its own in steps that wait for each other. So a chunk for about every
# multiprocessor, and more chunks only where the steps would be many.
MAX_CHUNKS = ((65_536, 128), (1 << 62, 256))
# Counts that a program of the second launch loads together, and its warps.
COUNTS_AT_ONCE = 16384
PLACE_WARPS = 4


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
    CHUNK: tl.constexpr,
    PADDED_E: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program c: how many pairs of chunk c have each expert.

    Shapes: ids int32 [P]; counts int32 [C, E]. A chunk is CHUNK pairs.

    Example, E = 2, chunks of 4: ids = [1, -1, 1, 0, 0] give counts = [[1, 2], [1, 0]].
    """
    if USE_PDL:
        cuda.gdc_wait()
        # Only now, so that the ids are complete when the next kernel begins.
        cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    pairs_B = chunk * CHUNK + tl.arange(0, CHUNK)
    ids_B = tl.load(ids_ptr + pairs_B, mask=pairs_B < num_pairs, other=-1)
    counts_E = tl.histogram(ids_B, PADDED_E, mask=ids_B >= 0)
    experts_E = tl.arange(0, PADDED_E)
    tl.store(counts_ptr + chunk * num_experts + experts_E, counts_E, mask=experts_E < num_experts)


@triton.jit
def _ranks(ids_C, NUM_STEPS: tl.constexpr, BLOCK: tl.constexpr, PADDED_E: tl.constexpr):
    """How many pairs before each one have its expert; int32, arbitrary where there is no expert.

    Within BLOCK pairs each is compared with each; how many pairs of an expert the steps before have
    seen is carried along.

    Example, BLOCK = 2: ids = [2, 0, 2, 2], of which the first two have seen experts 2 and 0 once,
    give [0, 0, 1 + 0, 1 + 1].
    """
    ids_SB = tl.reshape(ids_C, [NUM_STEPS, BLOCK])
    steps_S1 = tl.arange(0, NUM_STEPS)[:, None]
    lanes_B = tl.arange(0, BLOCK)
    is_before_BB = lanes_B[None, :] < lanes_B[:, None]
    seen_E = tl.zeros([PADDED_E], tl.int32)
    ranks_SB = tl.zeros([NUM_STEPS, BLOCK], tl.int32)
    for step in range(NUM_STEPS):
        # From registers: a load in each step would wait for memory each time.
        ids_B = tl.sum(tl.where(steps_S1 == step, ids_SB, 0), axis=0)
        is_earlier_BB = (ids_B[:, None] == ids_B[None, :]) & is_before_BB
        ranks_B = tl.sum(is_earlier_BB.to(tl.int32), axis=1)
        ranks_B += tl.gather(seen_E, tl.maximum(ids_B, 0), axis=0)
        ranks_SB = tl.where(steps_S1 == step, ranks_B[None, :], ranks_SB)
        seen_E += tl.histogram(ids_B, PADDED_E, mask=ids_B >= 0)
    return tl.reshape(ranks_SB, [NUM_STEPS * BLOCK])


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])
def _place_kernel(
    ids_ptr,
    counts_ptr,
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

    Shapes as in the other kernels. A chunk is NUM_STEPS * BLOCK pairs.

    Example, as for `_count_kernel`: the experts start at 0 and 2; chunk 0 begins there, chunk 1 at
    1 and 4; offsets = [0, 2, 4], pairs = [3, 4, 0, 2, unwritten].
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
    # Before the wait, as the counting kernel has let this one begin only after its own.
    chunk = tl.program_id(0)
    pairs_C = chunk * NUM_STEPS * BLOCK + tl.arange(0, NUM_STEPS * BLOCK)
    ids_C = tl.load(ids_ptr + pairs_C, mask=pairs_C < num_pairs, other=-1, cache_modifier=".cg")
    ranks_C = _ranks(ids_C, NUM_STEPS, BLOCK, PADDED_E)
    if USE_PDL:
        cuda.gdc_wait()

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

    first_C = tl.gather(starts_E + before_E, tl.maximum(ids_C, 0), axis=0)
    tl.store(pairs_ptr + first_C + ranks_C, pairs_C, mask=ids_C >= 0)


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
    max_chunks = next(most for limit, most in MAX_CHUNKS if num_pairs <= limit)
    # A power of two, because each value is another compilation.
    num_steps = triton.next_power_of_2(triton.cdiv(num_pairs, max_chunks * BLOCK))
    chunk = num_steps * BLOCK
    num_chunks = triton.cdiv(num_pairs, chunk)
    counts_CE = torch.empty(num_chunks, num_experts, dtype=torch.int32, device=ids_P.device)
    # A histogram takes a warp for its bins.
    padded_experts = max(32, triton.next_power_of_2(num_experts))
    options = {"PADDED_E": padded_experts, "USE_PDL": use_pdl, "launch_pdl": use_pdl}
    launch_kernel(
        _count_kernel,
        (num_chunks,),
        ids_P,
        counts_CE,
        num_pairs,
        num_experts,
        CHUNK=chunk,
        num_warps=4,
        **options,
    )
    launch_kernel(
        _place_kernel,
        (num_chunks,),
        ids_P,
        counts_CE,
        offsets_E1,
        pairs_P,
        num_pairs,
        num_experts,
        num_chunks,
        NUM_STEPS=num_steps,
        BLOCK=BLOCK,
        CHUNKS_AT_ONCE=max(1, COUNTS_AT_ONCE // padded_experts),
        num_warps=PLACE_WARPS,
        **options,
    )
