"""The search for the cut of a row that top_k and top_p make, without sorting it.

A cut is the largest key whose count reaches ``top_k``, or whose mass reaches ``top_p`` of the total
(see `kernels.sampling_row`). It is kept in an interval of keys, which shrinks:

1. `narrow_kernel`, a few times: all programs of a row tally its logits at 8 pivots, evenly spread
   over the interval's logits; the last to arrive keeps the interval between two of them. It is over
   for a row as soon as its interval holds few logits, for most rows after the first time.
2. `gather_kernel` lists the few logits of the interval, in any order.
3. `select_kernel`, one program a row, halves what is left three times a pass until one key is left,
   by reading the list; and where many logits are equal to the cut, likewise the last id that stays.
   Where the list would be too long (thousands of equal logits, or top_p after a top_k of thousands)
   it reads the whole row instead, which is correct, but slow.

Legend: B rows, V vocabulary, S segments of a row, N logits of a tile, P pivots, C capacity of a
list.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .floats import keys_of, values_of
from .sampling_row import (
    ABOVE,
    BY_COUNT,
    BY_MASS,
    CUT,
    DONE,
    HIGH,
    IS_GATHERED,
    LARGEST,
    LARGEST_FINITE_KEY,
    LARGEST_ID,
    LAST_ID,
    LOW,
    NUM_ABOVE,
    NUM_FIELDS,
    NUM_GATHERED,
    SEARCH,
    TARGET,
    TOP_P,
    load_keys,
    load_scale,
    pick,
    share_of,
    tally,
    weights_of,
)

NUM_PIVOTS = tl.constexpr(8)


@triton.jit(do_not_specialize=["params_stride"])
def narrow_kernel(
    logits_ptr,
    params_ptr,
    state_ptr,
    counts_ptr,
    masses_ptr,
    counters_ptr,
    vocab_size,
    row_stride,
    params_stride,
    IS_FIRST: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (segment, row): tally a segment; the row's last one to arrive shrinks the interval.

    The first time it also learns the total, of which top_p takes a share, and spreads its pivots
    over the logits that can matter: if the others were all V just below x, they would weigh less
    than ``1 - top_p`` of the largest one, so the cut of top_p is not below
    ``x = largest - temperature * log(V / (1 - top_p))``. The first pivot stays at the lower end.

    Shapes: logits [B, V] of any float dtype with a row stride; params float64 [5, B] with a stride;
    state int64 [B, NUM_FIELDS]; counts and masses int64 [B, P, S]; counters int32, one a row, zero
    before and after.

    Example: interval [key of 1, key of 9), top_k 20, counts 900, 500, 300, 100, 40, 15, 4, 1 at the
    pivots 1, 2, ..., 8: the cut is in [key of 5, key of 6), and all 40 from 5 up fit the list.
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    segment = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    state_ptr += row * NUM_FIELDS
    params_ptr += row
    search = tl.load(state_ptr + SEARCH)
    if (search == DONE) | (tl.load(state_ptr + IS_GATHERED) != 0):
        return
    low = tl.load(state_ptr + LOW)
    high = tl.load(state_ptr + HIGH)
    largest = tl.load(state_ptr + LARGEST).to(tl.int32)
    scale = load_scale(params_ptr, params_stride)
    top_p = tl.load(params_ptr + TOP_P * params_stride)

    lowest_value = values_of(low.to(tl.int32))
    if IS_FIRST:  # noqa: SIM102 (it is known when the kernel is compiled)
        if search == BY_MASS:
            rest = (1.0 - top_p).to(tl.float32)
            nearest = values_of(largest) - tl.log2(vocab_size / rest) / scale
            lowest_value = tl.maximum(lowest_value, nearest)
    pivots_P = _spread(low, high, lowest_value, IS_FIRST)

    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, vocab_size)
    row_ptr = logits_ptr + row * row_stride
    pivots = tl.arange(0, NUM_PIVOTS)
    counts_ptr += row * NUM_PIVOTS * NUM_SEGMENTS
    masses_ptr += row * NUM_PIVOTS * NUM_SEGMENTS
    if search == BY_MASS:
        counts_P, masses_P = tally(
            row_ptr, row_ptr, first, last, pivots_P.to(tl.int32), largest, scale, 0,
            BLOCK, NUM_PIVOTS, IS_LISTED=False, WITH_MASS=True, BY_ID=False,
        )  # fmt: skip
        tl.store(counts_ptr + pivots * NUM_SEGMENTS + segment, counts_P)
        tl.store(masses_ptr + pivots * NUM_SEGMENTS + segment, masses_P)
    else:
        counts_P, masses_P = tally(
            row_ptr, row_ptr, first, last, pivots_P.to(tl.int32), largest, scale, 0,
            BLOCK, NUM_PIVOTS, IS_LISTED=False, WITH_MASS=False, BY_ID=False,
        )  # fmt: skip
        tl.store(counts_ptr + pivots * NUM_SEGMENTS + segment, counts_P)

    # All is stored before the arrival is announced.
    tl.debug_barrier()
    num_arrived = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel", scope="gpu")
    if num_arrived != NUM_SEGMENTS - 1:
        return
    tl.store(counters_ptr + row, 0)
    counts_P = _sum_segments(counts_ptr, NUM_SEGMENTS, PADDED_SEGMENTS)
    sums_P = counts_P
    if search == BY_MASS:
        sums_P = _sum_segments(masses_ptr, NUM_SEGMENTS, PADDED_SEGMENTS)
    target = tl.load(state_ptr + TARGET)
    if IS_FIRST:
        total = tl.max(sums_P, axis=0)
        share = share_of(top_p, total)
        target = tl.where(search == BY_MASS, share, tl.minimum(target, total))
        tl.store(state_ptr + TARGET, target)

    index = tl.sum((sums_P >= target).to(tl.int32), axis=0) - 1
    low = pick(pivots_P, index, high, NUM_PIVOTS)
    count = pick(counts_P, index, 0, NUM_PIVOTS)
    num_above = pick(counts_P, index + 1, tl.load(state_ptr + NUM_ABOVE), NUM_PIVOTS)
    above = pick(sums_P, index + 1, tl.load(state_ptr + ABOVE), NUM_PIVOTS)
    high = pick(pivots_P, index + 1, high, NUM_PIVOTS)
    if count <= CAPACITY:
        high = largest.to(tl.int64) + 1
        above = tl.zeros([], tl.int64)
    # Where top_p follows top_k, it needs to see all that top_k leaves.
    is_last_filter = (search == BY_MASS) | (top_p >= 1.0)
    fits = (count <= CAPACITY) | (is_last_filter & (count - num_above <= CAPACITY))
    tl.store(state_ptr + LOW, low)
    tl.store(state_ptr + HIGH, high)
    tl.store(state_ptr + ABOVE, above)
    tl.store(state_ptr + NUM_ABOVE, num_above)
    tl.store(state_ptr + IS_GATHERED, fits.to(tl.int64))


@triton.jit
def _spread(low, high, lowest_value, IS_FIRST: tl.constexpr):
    """Keys in [low, high): ``low``, then those of evenly spread logits from ``lowest_value`` up."""
    indices_P = tl.arange(0, NUM_PIVOTS)
    if IS_FIRST:
        shares_P = (indices_P - 1).to(tl.float32) / (NUM_PIVOTS - 1)
    else:
        shares_P = indices_P.to(tl.float32) / NUM_PIVOTS
    # A sum of two products, because the difference of two logits may be infinite.
    highest_value = values_of((high - 1).to(tl.int32))
    keys_P = keys_of(lowest_value * (1.0 - shares_P) + highest_value * shares_P).to(tl.int64)
    keys_P = tl.minimum(tl.maximum(keys_P, low), high - 1)
    return tl.where(indices_P == 0, low, keys_P)


@triton.jit
def _sum_segments(partial_ptr, NUM_SEGMENTS: tl.constexpr, PADDED_SEGMENTS: tl.constexpr):
    """int64 [P] sums of int64 [P, S]."""
    pivots_P1 = tl.arange(0, NUM_PIVOTS)[:, None]
    segments_1S = tl.arange(0, PADDED_SEGMENTS)[None, :]
    # Past the L1 cache, which may hold what was there before.
    partial_PS = tl.load(
        partial_ptr + pivots_P1 * NUM_SEGMENTS + segments_1S,
        mask=segments_1S < NUM_SEGMENTS,
        other=0,
        cache_modifier=".cg",
    )
    return tl.sum(partial_PS, axis=1)


@triton.jit
def gather_kernel(
    logits_ptr,
    state_ptr,
    listed_keys_ptr,
    listed_ids_ptr,
    vocab_size,
    row_stride,
    SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (segment, row): list the logits whose key is in the row's interval.

    Shapes: logits [B, V] of any float dtype with a row stride; state int64 [B, NUM_FIELDS]; listed
    keys and ids int32 [B, C].

    Example: interval [key of 2, key of 4), logits [1, 3, 5, 2]: ids 1 and 3 with their keys.
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    state_ptr += row * NUM_FIELDS
    if tl.load(state_ptr + IS_GATHERED) == 0:
        return
    low = tl.load(state_ptr + LOW)
    high = tl.load(state_ptr + HIGH)
    ids = tl.program_id(0) * SEGMENT + tl.arange(0, SEGMENT)
    keys = tl.minimum(load_keys(logits_ptr + row * row_stride, ids, vocab_size), LARGEST_FINITE_KEY)
    is_inside = (keys >= low.to(tl.int32)) & (keys <= (high - 1).to(tl.int32))
    num_inside = tl.sum(is_inside.to(tl.int32), axis=0)
    if num_inside > 0:
        start = tl.atomic_add(state_ptr + NUM_GATHERED, num_inside.to(tl.int64), sem="relaxed")
        places = start + tl.cumsum(is_inside.to(tl.int32), axis=0) - 1
        tl.store(listed_keys_ptr + row * CAPACITY + places, keys, mask=is_inside)
        tl.store(listed_ids_ptr + row * CAPACITY + places, ids, mask=is_inside)


@triton.jit(do_not_specialize=["params_stride"])
def select_kernel(
    logits_ptr,
    params_ptr,
    state_ptr,
    listed_keys_ptr,
    listed_ids_ptr,
    vocab_size,
    row_stride,
    params_stride,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (row): the cut, and the last id that stays of the logits equal to it.

    Shapes: logits [B, V] of any float dtype with a row stride; params float64 [5, B] with a stride;
    state int64 [B, NUM_FIELDS], of which CUT and LAST_ID are written; listed keys and ids int32
    [B, C].

    Example, top_p 0.6 alone: logits with the weights [4, 2, 2, 1] have the total 9, of which 5.4
    are to be reached. From 4 up there is a mass of 4, from 2 up one of 8: the cut is the key of the
    logits that weigh 2, of which one is enough. The last id that stays is 1.
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    state_ptr += row * NUM_FIELDS
    params_ptr += row
    if tl.load(state_ptr + SEARCH) == DONE:
        return
    if tl.load(state_ptr + IS_GATHERED) != 0:
        num_gathered = tl.load(state_ptr + NUM_GATHERED).to(tl.int32)
        _select(
            listed_keys_ptr + row * CAPACITY, listed_ids_ptr + row * CAPACITY, num_gathered,
            params_ptr, params_stride, state_ptr, vocab_size, BLOCK, IS_LISTED=True,
        )  # fmt: skip
    else:
        row_ptr = logits_ptr + row * row_stride
        _select(
            row_ptr, row_ptr, vocab_size,
            params_ptr, params_stride, state_ptr, vocab_size, BLOCK, IS_LISTED=False,
        )  # fmt: skip


@triton.jit
def _select(
    values_ptr,
    ids_ptr,
    length,
    params_ptr,
    params_stride,
    state_ptr,
    vocab_size,
    BLOCK: tl.constexpr,
    IS_LISTED: tl.constexpr,
):
    """Find the cut among ``length`` elements: the list, which is all of an interval, or the row.

    Pointers are those of the row. top_k comes before top_p, and keeps all logits equal to its cut.

    Shapes: values and ids as `tally` takes them, ``length`` of each; params float64, one of each
    kind a stride apart; state int64 [NUM_FIELDS].

    Example, top_k 2 and top_p 0.6: of the weights [4, 2, 2, 1] top_k leaves 4, 2 and 2, of whose 8
    top_p wants 4.8: 4 and one 2, so the cut is the key of those that weigh 2, and the last id 1.
    """
    top_p = tl.load(params_ptr + TOP_P * params_stride)
    scale = load_scale(params_ptr, params_stride)
    largest = tl.load(state_ptr + LARGEST).to(tl.int32)
    low = tl.load(state_ptr + LOW)
    high = tl.load(state_ptr + HIGH)
    above = tl.load(state_ptr + ABOVE)
    target = tl.load(state_ptr + TARGET)
    nothing = tl.zeros([], tl.int64)
    if tl.load(state_ptr + SEARCH) == BY_COUNT:
        low, _at_low, _above = _find(
            values_ptr, ids_ptr, length, low, high, above, target, largest, scale, 0,
            BLOCK, IS_LISTED, WITH_MASS=False, BY_ID=False,
        )  # fmt: skip
        high = largest.to(tl.int64) + 1
        above = nothing
        if top_p < 1.0:
            same_P = tl.zeros([NUM_PIVOTS], tl.int32) + low.to(tl.int32)
            _counts_P, masses_P = tally(
                values_ptr, ids_ptr, 0, length, same_P, largest, scale, 0,
                BLOCK, NUM_PIVOTS, IS_LISTED, WITH_MASS=True, BY_ID=False,
            )  # fmt: skip
            target = share_of(top_p, tl.max(masses_P, axis=0))
    last_id = tl.full([], LARGEST_ID, tl.int64)
    if top_p < 1.0:
        low, at_low, above = _find(
            values_ptr, ids_ptr, length, low, high, above, target, largest, scale, 0,
            BLOCK, IS_LISTED, WITH_MASS=True, BY_ID=False,
        )  # fmt: skip
        # All logits equal to the cut weigh the same, and above zero, since they reach the target.
        cut = low.to(tl.int32)
        weight = weights_of(cut, largest, scale)
        num_equal = (at_low - above) // weight
        num_kept = (target - above + weight - 1) // weight
        if num_kept < num_equal:
            last_id, _at_low, _above = _find(
                values_ptr, ids_ptr, length, nothing - vocab_size, nothing + 1, nothing, num_kept,
                largest, scale, cut, BLOCK, IS_LISTED, WITH_MASS=False, BY_ID=True,
            )  # fmt: skip
            last_id = -last_id
    tl.store(state_ptr + CUT, low)
    tl.store(state_ptr + LAST_ID, last_id)


@triton.jit
def _find(
    values_ptr,
    ids_ptr,
    length,
    low,
    high,
    above,
    target,
    largest,
    scale,
    tied_key,
    BLOCK: tl.constexpr,
    IS_LISTED: tl.constexpr,
    WITH_MASS: tl.constexpr,
    BY_ID: tl.constexpr,
):
    """The largest key in [low, high) whose count or mass reaches ``target``.

    Args:
        values_ptr, ids_ptr, length: elements as `tally` takes them.
        low, high, above: a key that reaches the target, one that does not, and its sum. A list has
            nothing from ``high`` up.

    Returns:
        The key, its sum and the sum of the key after it.
    """
    # What the elements lack of the sums.
    missing = above if IS_LISTED else tl.zeros([], tl.int64)
    at_low = target
    is_open = high > low
    while is_open:
        step = (high - low + NUM_PIVOTS - 1) // NUM_PIVOTS
        pivots_P = tl.minimum(low + step * tl.arange(0, NUM_PIVOTS), high - 1)
        counts_P, masses_P = tally(
            values_ptr, ids_ptr, 0, length, pivots_P.to(tl.int32), largest, scale,
            tied_key, BLOCK, NUM_PIVOTS, IS_LISTED, WITH_MASS=WITH_MASS, BY_ID=BY_ID,
        )  # fmt: skip
        sums_P = (masses_P if WITH_MASS else counts_P) + missing
        index = tl.sum((sums_P >= target).to(tl.int32), axis=0) - 1
        low = pick(pivots_P, index, high, NUM_PIVOTS)
        at_low = pick(sums_P, index, above, NUM_PIVOTS)
        high = pick(pivots_P, index + 1, high, NUM_PIVOTS)
        above = pick(sums_P, index + 1, above, NUM_PIVOTS)
        is_open = high - low > 1
    return low, at_low, above
