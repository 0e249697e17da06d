"""Sampling: temperature, min_p, top_k, top_p and the draw, for rows that each have their own.

Seven launches, whatever the rows ask for, so that a CUDA graph can hold them: the largest logit,
the search for the cut (`kernels.sampling_search`), and the draw. Rows that have nothing to search
for, and greedy rows, which are ready after the first launch, let the others pass.

What may differ from the float64 reference (`moe_engine.ops.reference.sampling`), because weights
are float32 exponentials in multiples of 2**-40 of the largest one:
- A cumulative probability is off by about 1e-6, so a draw closer than that to a boundary between
  two tokens may fall on the other side; so may a token at the edge of top_p or min_p.
- Tokens less likely than 2**-40 of the most likely one are never drawn.
- Logits are compared as they are, not after the division by the temperature, which may make two
  float32 numbers equal that were neighbours, and infinite ones of those above 3e38 * temperature.
A row's token depends on its own logits and parameters alone, bit for bit.

Legend: B rows, V vocabulary, S segments of a row, P pivots, C capacity of a list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import COUNTERS_PER_STREAM, arrival_counters, launch_kernel, supports_pdl
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
    keys_of,
    load_keys,
    load_scale,
    values_of,
    weights_of,
)
from .sampling_search import NUM_PIVOTS, gather_kernel, narrow_kernel, select_kernel

# Logits of a program, and of a tile where they are tallied at all pivots.
SEGMENT = 4096
BLOCK = 1024
# The longest list of logits that may be the cut.
CAPACITY = 4096
# Each of them divides the interval of the cut by 8.
NUM_NARROWINGS = 3
# Rows of one launch, which bounds the memory for lists (32 KiB a row).
MAX_ROWS = 1024

_SMALLEST_KEY = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=["params_stride"])
def _start_kernel(
    logits_ptr,
    params_ptr,
    state_ptr,
    partial_ptr,
    counters_ptr,
    tokens_ptr,
    vocab_size,
    row_stride,
    params_stride,
    SEGMENT: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (segment, row): the extremes of a segment; the row's last one sets up its state.

    The most likely token is stored for every row. It is final where the temperature is 0 or where
    all logits are -inf. min_p becomes the lower end of the interval that the cut is in:
    ``weight < min_p * largest weight`` where ``logit < largest + temperature * log(min_p)``.

    Shapes: logits [B, V] of any float dtype with a row stride; params float64 [5, B] with a stride;
    state int64 [B, NUM_FIELDS]; partial int32 [B, 3, S], largest key, its lowest id, and smallest
    key above that of -inf; counters int32, one a row, zero before and after; tokens int64 [B].
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    segment = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    ids = segment * SEGMENT + tl.arange(0, SEGMENT)
    keys = load_keys(logits_ptr + row * row_stride, ids, vocab_size)
    key = tl.max(keys, axis=0)
    # Past the end of the row keys are those of -inf, whose first id is inside.
    token = tl.min(tl.where(keys == key, ids, LARGEST_ID), axis=0)
    smallest = tl.min(tl.where(keys > MINUS_INF_KEY, keys, LARGEST_FINITE_KEY), axis=0)

    partial_ptr += row * 3 * NUM_SEGMENTS
    tl.store(partial_ptr + segment, key)
    tl.store(partial_ptr + NUM_SEGMENTS + segment, token)
    tl.store(partial_ptr + 2 * NUM_SEGMENTS + segment, smallest)
    # All is stored before the arrival is announced.
    tl.debug_barrier()
    num_arrived = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel", scope="gpu")
    if num_arrived != NUM_SEGMENTS - 1:
        return
    tl.store(counters_ptr + row, 0)
    segments = tl.arange(0, PADDED_SEGMENTS)
    exists = segments < NUM_SEGMENTS
    partial_ptr += segments
    # Past the L1 cache, which may hold what was there before.
    keys = tl.load(partial_ptr, mask=exists, other=_SMALLEST_KEY, cache_modifier=".cg")
    tokens = tl.load(
        partial_ptr + NUM_SEGMENTS, mask=exists, other=LARGEST_ID, cache_modifier=".cg"
    )
    smallest_keys = tl.load(
        partial_ptr + 2 * NUM_SEGMENTS, mask=exists, other=LARGEST_FINITE_KEY, cache_modifier=".cg"
    )
    key = tl.max(keys, axis=0)
    token = tl.min(tl.where(keys == key, tokens, LARGEST_ID), axis=0)
    smallest = tl.min(smallest_keys, axis=0)
    tl.store(tokens_ptr + row, token.to(tl.int64))

    params_ptr += row
    state_ptr += row * NUM_FIELDS
    temperature = tl.load(params_ptr + TEMPERATURE * params_stride)
    is_drawn = (temperature > 0.0) & (key > MINUS_INF_KEY)
    tl.store(state_ptr + IS_DRAWN, is_drawn.to(tl.int64))
    tl.store(state_ptr + IS_GATHERED, 0)
    tl.store(state_ptr + SEARCH, DONE)
    if is_drawn:
        largest = tl.minimum(key, LARGEST_FINITE_KEY)
        min_p = tl.load(params_ptr + MIN_P * params_stride).to(tl.float32)
        top_k = tl.load(params_ptr + TOP_K * params_stride)
        top_p = tl.load(params_ptr + TOP_P * params_stride)
        low = smallest
        if min_p > 0.0:
            scale = load_scale(params_ptr, params_stride)
            low = tl.maximum(low, keys_of(values_of(largest) + tl.log2(min_p) / scale))
        has_top_k = (top_k > 0.0) & (top_k < vocab_size)
        search = tl.where(has_top_k, BY_COUNT, tl.where(top_p < 1.0, BY_MASS, DONE))
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


@triton.jit(do_not_specialize=["params_stride"])
def _draw_kernel(
    logits_ptr,
    params_ptr,
    state_ptr,
    masses_ptr,
    counters_ptr,
    tokens_ptr,
    vocab_size,
    row_stride,
    params_stride,
    SEGMENT: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (segment, row): weigh what the cut leaves; the row's last one to arrive draws.

    The token is the lowest id whose cumulative weight exceeds ``uniform`` times the total.

    Shapes: as for `_start_kernel`; masses int64 [B, S].

    Example: weights [1, 0, 2, 1] in two segments of 2, uniform 0.5: 0.5 * 4 = 2 is in the second,
    whose weights start at 1; the cumulative weights there are 3 and 4, so the token is 2.
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    segment = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    state_ptr += row * NUM_FIELDS
    params_ptr += row
    if tl.load(state_ptr + IS_DRAWN) == 0:
        return
    largest = tl.load(state_ptr + LARGEST).to(tl.int32)
    cut = tl.load(state_ptr + CUT).to(tl.int32)
    last_id = tl.load(state_ptr + LAST_ID).to(tl.int32)
    scale = load_scale(params_ptr, params_stride)
    row_ptr = logits_ptr + row * row_stride
    ids = segment * SEGMENT + tl.arange(0, SEGMENT)
    weights = _kept_weights(row_ptr, ids, vocab_size, cut, last_id, largest, scale)
    masses_ptr += row * NUM_SEGMENTS
    tl.store(masses_ptr + segment, tl.sum(weights, axis=0))
    # It is stored before the arrival is announced.
    tl.debug_barrier()
    num_arrived = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel", scope="gpu")
    if num_arrived != NUM_SEGMENTS - 1:
        return
    tl.store(counters_ptr + row, 0)
    segments = tl.arange(0, PADDED_SEGMENTS)
    # Past the L1 cache, which may hold what was there before.
    masses = tl.load(
        masses_ptr + segments, mask=segments < NUM_SEGMENTS, other=0, cache_modifier=".cg"
    )
    total = tl.sum(masses, axis=0)
    uniform = tl.load(params_ptr + UNIFORM * params_stride)
    # The product may be rounded up to the total.
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    chosen = tl.sum((tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)
    target -= tl.sum(tl.where(segments < chosen, masses, 0), axis=0)
    ids = chosen * SEGMENT + tl.arange(0, SEGMENT)
    weights = _kept_weights(row_ptr, ids, vocab_size, cut, last_id, largest, scale)
    place = tl.sum((tl.cumsum(weights, axis=0) <= target).to(tl.int32), axis=0)
    tl.store(tokens_ptr + row, (chosen * SEGMENT + place).to(tl.int64))


@triton.jit
def _kept_weights(row_ptr, ids, vocab_size, cut, last_id, largest, scale):
    """int64 weights of the logits that the cut leaves, 0 for the others."""
    keys = tl.minimum(load_keys(row_ptr, ids, vocab_size), LARGEST_FINITE_KEY)
    is_kept = (keys > cut) | ((keys == cut) & (ids <= last_id))
    return tl.where(is_kept, weights_of(keys, largest, scale), 0)


def sample_tokens(logits_BV: torch.Tensor, params_5B: torch.Tensor) -> torch.Tensor:
    """int64 [B] tokens; see `moe_engine.ops.sampling.sample_tokens`, which checks the arguments."""
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    tokens_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    assert MAX_ROWS <= COUNTERS_PER_STREAM
    for start in range(0, len(logits_BV), MAX_ROWS):
        rows = slice(start, start + MAX_ROWS)
        _sample_rows(logits_BV[rows], params_5B[:, rows], tokens_B[rows])
    return tokens_B


def _sample_rows(logits_BV: torch.Tensor, params_5B: torch.Tensor, tokens_B: torch.Tensor) -> None:
    num_rows, vocab_size = logits_BV.shape
    device = logits_BV.device
    num_segments = triton.cdiv(vocab_size, SEGMENT)
    grid = (num_segments, num_rows)
    use_pdl = supports_pdl(device)
    counters = arrival_counters(device)
    pivots = NUM_PIVOTS.value

    def workspace(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=device)

    state = workspace(NUM_FIELDS.value, dtype=torch.int64)
    extremes_B3S = workspace(3, num_segments, dtype=torch.int32)
    counts_BPS = workspace(pivots, num_segments, dtype=torch.int64)
    masses_BPS = workspace(pivots, num_segments, dtype=torch.int64)
    listed_keys_BC = workspace(CAPACITY, dtype=torch.int32)
    listed_ids_BC = workspace(CAPACITY, dtype=torch.int32)
    launch = {"USE_PDL": use_pdl, "launch_pdl": use_pdl, "num_warps": 8}
    split = {
        "SEGMENT": SEGMENT,
        "NUM_SEGMENTS": num_segments,
        "PADDED_SEGMENTS": triton.next_power_of_2(num_segments),
    }
    sizes = (vocab_size, logits_BV.stride(0), params_5B.stride(0))

    launch_kernel(
        _start_kernel, grid, logits_BV, params_5B, state, extremes_B3S, counters, tokens_B, *sizes,
        **split, **launch,
    )  # fmt: skip
    for index in range(NUM_NARROWINGS):
        launch_kernel(
            narrow_kernel, grid,
            logits_BV, params_5B, state, counts_BPS, masses_BPS, counters, *sizes,
            IS_FIRST=index == 0, BLOCK=BLOCK, CAPACITY=CAPACITY, **split, **launch,
        )  # fmt: skip
    launch_kernel(
        gather_kernel, grid, logits_BV, state, listed_keys_BC, listed_ids_BC, vocab_size,
        logits_BV.stride(0), SEGMENT=SEGMENT, CAPACITY=CAPACITY, **launch,
    )  # fmt: skip
    launch_kernel(
        select_kernel, (num_rows,),
        logits_BV, params_5B, state, listed_keys_BC, listed_ids_BC, *sizes,
        BLOCK=BLOCK, CAPACITY=CAPACITY, **launch,
    )  # fmt: skip
    # The masses of segments take the place of those of pivots.
    launch_kernel(
        _draw_kernel, grid, logits_BV, params_5B, state, masses_BPS, counters, tokens_B, *sizes,
        **split, **launch,
    )  # fmt: skip
