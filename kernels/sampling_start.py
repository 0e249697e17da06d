"""The first launch of sampling: the largest logit, and the token of every row that filters nothing.

A program has some parts of a row; the last one of a row to arrive knows what all of them found, and
decides. Greedy rows and rows that draw from all their logits are done then, after one read of the
logits; the rest get the state that the search for their cut starts from.

**A draw from all logits.** A program does not know the row's largest logit yet, so it weighs each
part of the row relative to the part's own: int64 multiples of 2**-40 of that weight. The last
program scales these masses to the row's largest logit (float64, rounded down), draws a part, and
then a token of the part by its own weights. Parts have one length whatever the batch, and integers
one sum, so a row's token depends on that row alone.

Legend: B rows, V vocabulary, S parts of a row, W logits of a part.
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
    IS_DRAWN,
    IS_GATHERED,
    LARGEST,
    LARGEST_FINITE,
    LARGEST_FINITE_KEY,
    LARGEST_ID,
    LAST_ID,
    LOW,
    MIN_P,
    MINUS_INF_KEY,
    NUM_ABOVE,
    NUM_FIELDS,
    NUM_GATHERED,
    SEARCH,
    TARGET,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNIFORM,
    load_logits,
    load_scale,
    scale_of,
    weights_of_values,
)

# Logits that are weighed together; what a row that does not filter draws depends on it in the last
# bits.
PART = 2048
NUM_WARPS = 4
# Programs to aim at, several for each place that the multiprocessors have: a program of more parts
# arrives once for all of them.
NUM_PROGRAMS = 4096


@triton.jit(do_not_specialize=["params_stride", "parts_per_program"])
def start_kernel(
    logits_ptr,
    params_ptr,
    state_ptr,
    partial_ptr,
    counters_ptr,
    tokens_ptr,
    vocab_size,
    row_stride,
    params_stride,
    parts_per_program,
    MAY_FILTER: tl.constexpr,
    PART: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (parts_per_program parts, row): look through them; the row's last one decides.

    Next to the largest logit of each part, a greedy row needs its lowest id, a row that draws from
    all its logits their mass, and a row that filters the smallest one above -inf.

    Shapes: logits [B, V] of any float dtype with a row stride; params float64 [5, B] with a stride;
    state int64 [B, NUM_FIELDS], only if MAY_FILTER; partial int64 [B, 2, S], the key of the largest
    logit and the other number; counters int32, one a row, zero before and after; tokens int64 [B],
    of rows that filter not written.

    Example, temperature 1 and no filter: logits [0, log 2, log 4, log 4] in two parts of 2 have the
    masses 1.5 and 2, relative to 2 and 4. Relative to 4 they are 0.75 and 2; uniform 0.5 is at
    1.375, which is 0.625 in the second part, whose first weight is 1: the token is 2.
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    params_ptr += row
    temperature = tl.load(params_ptr + TEMPERATURE * params_stride)
    is_drawn = temperature > 0.0
    scale = scale_of(tl.where(is_drawn, temperature, 1.0))
    is_filtered = False
    if MAY_FILTER:
        is_filtered = is_drawn & _filters(params_ptr, params_stride, vocab_size)
    partial_ptr += row * 2 * NUM_PARTS
    for index in range(parts_per_program):
        part = tl.program_id(0) * parts_per_program + index
        ids_W = part * PART + tl.arange(0, PART)
        logits_W = load_logits(row_ptr, ids_W, vocab_size)
        largest = tl.max(logits_W, axis=0)
        if is_filtered:
            above_W = tl.where(logits_W > float("-inf"), logits_W, LARGEST_FINITE)
            number = keys_of(tl.min(above_W, axis=0)).to(tl.int64)
        elif is_drawn:
            number = tl.sum(_weights(logits_W, _finite(largest), scale), axis=0)
        else:
            # Past the end of the row logits are -inf, whose first id is inside.
            best_W = tl.where(logits_W == largest, ids_W, LARGEST_ID)
            number = tl.min(best_W, axis=0).to(tl.int64)
        if part < NUM_PARTS:
            tl.store(partial_ptr + part, keys_of(largest).to(tl.int64))
            tl.store(partial_ptr + NUM_PARTS + part, number)
    # All is stored before the arrival is announced.
    tl.debug_barrier()
    num_arrived = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel", scope="gpu")
    if num_arrived != tl.num_programs(0) - 1:
        return
    tl.store(counters_ptr + row, 0)
    parts_S = tl.arange(0, PADDED_PARTS)
    exists_S = parts_S < NUM_PARTS
    partial_ptr += parts_S
    # Past the L1 cache, which may hold what was there before.
    keys_S = tl.load(partial_ptr, mask=exists_S, other=MINUS_INF_KEY, cache_modifier=".cg")
    numbers_S = tl.load(
        partial_ptr + NUM_PARTS, mask=exists_S, other=LARGEST_ID, cache_modifier=".cg"
    )
    uniform = tl.load(params_ptr + UNIFORM * params_stride)
    keys_S = keys_S.to(tl.int32)
    largest_key = tl.max(keys_S, axis=0)
    # Where nothing can be drawn the token is 0, and final.
    is_drawn = is_drawn & (largest_key > MINUS_INF_KEY)
    is_searched = is_drawn & is_filtered
    if MAY_FILTER:
        state_ptr += row * NUM_FIELDS
        if is_searched:
            smallest_key = tl.min(numbers_S, axis=0).to(tl.int32)
            _begin_search(
                params_ptr, params_stride, state_ptr, largest_key, smallest_key, vocab_size
            )
        else:
            _leave_out(state_ptr)
    if not is_searched:
        if is_drawn:
            token = _draw(
                row_ptr, keys_S, numbers_S, largest_key, scale, uniform, vocab_size, PART,
                PADDED_PARTS,
            )  # fmt: skip
        else:
            token = tl.min(tl.where(keys_S == largest_key, numbers_S, LARGEST_ID), axis=0)
            token = tl.where(largest_key > MINUS_INF_KEY, token, 0)
        tl.store(tokens_ptr + row, token)


@triton.jit
def _filters(params_ptr, params_stride, vocab_size):
    """Whether top_k, top_p or min_p may take logits away; ``params_ptr``: of the row."""
    top_k = tl.load(params_ptr + TOP_K * params_stride)
    top_p = tl.load(params_ptr + TOP_P * params_stride)
    min_p = tl.load(params_ptr + MIN_P * params_stride)
    return ((top_k > 0.0) & (top_k < vocab_size)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def _finite(values):
    """float32 values, infinite ones replaced by the finite ones next to them."""
    return tl.minimum(tl.maximum(values, -LARGEST_FINITE), LARGEST_FINITE)


@triton.jit
def _weights(logits, largest, scale):
    """int64 weights of logits, +inf as the largest float32; that of -inf is 0."""
    return weights_of_values(tl.minimum(logits, LARGEST_FINITE), largest, scale)


@triton.jit
def _draw(
    row_ptr,
    keys_S,
    masses_S,
    largest_key,
    scale,
    uniform,
    vocab_size,
    PART: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
):
    """Draw from all logits of a row: a part of it, then a token of the part.

    Each time the first one is taken whose cumulative weight exceeds the target.

    Args:
        row_ptr: logits [V] of any float dtype.
        keys_S, masses_S: int32 and int64; the key of each part's largest logit, and its mass
            relative to that; past the last part the key of -inf.
        largest_key: int32, the key of the row's largest logit, which is above -inf.
        scale, uniform: float32 of `scale_of`, and float64 below 1.

    Returns:
        The token, int64.

    Example, in units of 2**40: parts of 2 with the largest logits log 2 and log 4 and the masses
    1.5 and 2, temperature 1. Scaled to log 4 the masses are 0.75 and 2; uniform 0.5 is at 1.375, in
    the second part, 0.625 from its start. Its weights are 1 and 1, so the token is 2.
    """
    largest = tl.minimum(values_of(largest_key), LARGEST_FINITE)
    values_S = tl.minimum(values_of(keys_S), LARGEST_FINITE)
    factors_S = tl.exp2((values_S - largest) * scale).to(tl.float64)
    scaled_S = (masses_S.to(tl.float64) * factors_S).to(tl.int64)
    total = tl.sum(scaled_S, axis=0)
    position = uniform * total.to(tl.float64)
    # The product may be rounded up to the total.
    target = tl.minimum(position.to(tl.int64), total - 1)
    part = tl.sum((tl.cumsum(scaled_S, axis=0) <= target).to(tl.int32), axis=0)

    parts_S = tl.arange(0, PADDED_PARTS)
    before = tl.sum(tl.where(parts_S < part, scaled_S, 0), axis=0)
    is_chosen_S = parts_S == part
    factor = tl.sum(tl.where(is_chosen_S, factors_S, 0.0), axis=0)
    mass = tl.sum(tl.where(is_chosen_S, masses_S, 0), axis=0)
    key = tl.max(tl.where(is_chosen_S, keys_S, MINUS_INF_KEY), axis=0)
    # In the part's own, finer scale. What was rounded must not lead out of the part.
    target = ((position - before.to(tl.float64)) / factor).to(tl.int64)
    target = tl.minimum(tl.maximum(target, 0), mass - 1)

    ids = part * PART + tl.arange(0, PART)
    weights = _weights(load_logits(row_ptr, ids, vocab_size), _finite(values_of(key)), scale)
    place = tl.sum((tl.cumsum(weights, axis=0) <= target).to(tl.int32), axis=0)
    return (part * PART + place).to(tl.int64)


@triton.jit
def _leave_out(state_ptr):
    """The row's token is final; the kernels that follow pass it by."""
    tl.store(state_ptr + IS_DRAWN, 0)
    tl.store(state_ptr + IS_GATHERED, 0)
    tl.store(state_ptr + SEARCH, DONE)


@triton.jit
def _begin_search(params_ptr, params_stride, state_ptr, largest_key, smallest_key, vocab_size):
    """Set up the state of a row that filters.

    min_p becomes the lower end of the interval that the cut is in:
    ``weight < min_p * largest weight`` where ``logit < largest + temperature * log(min_p)``.

    Args:
        params_ptr, state_ptr: of the row; float64, one of each kind a stride apart, and int64
            [NUM_FIELDS].
        largest_key, smallest_key: int32, of the row's logits above -inf.

    Example: logits [0, 1, 2, 3], temperature 1, min_p 0.2, top_k 2: LOW and CUT are the key of
    3 + log 0.2 = 1.39, HIGH is one above the key of 3, SEARCH is BY_COUNT and TARGET 2.
    """
    largest = tl.minimum(largest_key, LARGEST_FINITE_KEY)
    min_p = tl.load(params_ptr + MIN_P * params_stride).to(tl.float32)
    top_k = tl.load(params_ptr + TOP_K * params_stride)
    top_p = tl.load(params_ptr + TOP_P * params_stride)
    low = tl.minimum(smallest_key, LARGEST_FINITE_KEY)
    if min_p > 0.0:
        scale = load_scale(params_ptr, params_stride)
        low = tl.maximum(low, keys_of(values_of(largest) + tl.log2(min_p) / scale))
    has_top_k = (top_k > 0.0) & (top_k < vocab_size)
    search = tl.where(has_top_k, BY_COUNT, tl.where(top_p < 1.0, BY_MASS, DONE))
    tl.store(state_ptr + IS_DRAWN, 1)
    tl.store(state_ptr + IS_GATHERED, 0)
    tl.store(state_ptr + SEARCH, search.to(tl.int64))
    tl.store(state_ptr + LARGEST, largest.to(tl.int64))
    tl.store(state_ptr + LOW, low.to(tl.int64))
    tl.store(state_ptr + HIGH, largest.to(tl.int64) + 1)
    tl.store(state_ptr + ABOVE, 0)
    tl.store(state_ptr + NUM_ABOVE, 0)
    tl.store(state_ptr + TARGET, top_k.to(tl.int64))
    tl.store(state_ptr + NUM_GATHERED, 0)
    tl.store(state_ptr + CUT, low.to(tl.int64))
    tl.store(state_ptr + LAST_ID, LARGEST_ID)
