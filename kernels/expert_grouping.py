"""Sorting (row, choice) pairs by expert in one launch, without a count coming back to the host.

Legend: P pairs (pair r * K + k is choice k of row r), E experts, R ranges of pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import supports_pdl

# Pairs of a range that a program looks at together; a warp's 32 lanes take four each.
BLOCK = 128
# (pairs up to, ranges, warps): a short list in one step, a long one in several.
SHAPES = ((512, 4, 4), (4096, 32, 8))
LONG_SHAPE = (64, 16)


@triton.jit
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


def group_by_expert(ids_P: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets int32 [E + 1] and pairs int32 [P] of contiguous int32 ids, as the kernel says."""
    (num_pairs,) = ids_P.shape
    offsets_E1 = torch.empty(num_experts + 1, dtype=torch.int32, device=ids_P.device)
    pairs_P = torch.empty(num_pairs, dtype=torch.int32, device=ids_P.device)
    num_ranges, num_warps = next(
        ((ranges, warps) for limit, ranges, warps in SHAPES if num_pairs <= limit), LONG_SHAPE
    )
    use_pdl = supports_pdl(ids_P.device)
    _group_kernel[(num_experts,)](
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
