"""Sampling: temperature, min_p, top_k, top_p and the draw, for rows that each have their own.

The first launch (`kernels.sampling_start`) finds the largest logits, and the token of every row
that is greedy or draws from all its logits. If no row may filter, that is all. Else six more
launches follow, whatever the rows ask for, so that a CUDA graph can hold them: the search for the
cut (`kernels.sampling_search`), and the draw from what it leaves. Rows that are done let them pass.

What may differ from the float64 reference (`moe_engine.ops.reference.sampling`), because weights
are float32 exponentials in multiples of 2**-40 of the largest one; in a row that does not filter,
of the largest one of `sampling_start.PART` neighbours, whose sum is then rounded down to a multiple
of 2**-40 of the row's largest one:
- A cumulative probability is off by about 1e-6, so a draw closer than that to a boundary between
  two tokens may fall on the other side; so may a token at the edge of top_p or min_p.
- In a row that filters, tokens less likely than 2**-40 of the most likely one are never drawn. In
  any other row this holds for parts of the row as a whole, and inside a part for tokens less likely
  than 2**-40 of its most likely one.
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
    CUT,
    IS_DRAWN,
    LARGEST,
    LARGEST_FINITE_KEY,
    LAST_ID,
    NUM_FIELDS,
    UNIFORM,
    load_keys,
    load_scale,
    weights_of,
)
from .sampling_search import NUM_PIVOTS, gather_kernel, narrow_kernel, select_kernel
from .sampling_start import NUM_PROGRAMS, NUM_WARPS, PART, start_kernel

# Logits of a program, and of a tile where they are tallied at all pivots.
SEGMENT = 4096
BLOCK = 1024
# The longest list of logits that may be the cut.
CAPACITY = 4096
# Each of them divides the interval of the cut by 8.
NUM_NARROWINGS = 3
# Rows of one launch, which bounds the memory for lists (32 KiB a row).
MAX_ROWS = 1024


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

    Shapes: logits [B, V] of any float dtype with a row stride; params float64 [5, B] with a stride;
    state int64 [B, NUM_FIELDS]; masses int64 [B, S]; counters int32, one a row, zero before and
    after; tokens int64 [B].

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


def sample_tokens(
    logits_BV: torch.Tensor,
    params_5B: torch.Tensor,
    *,
    may_filter: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """int64 [B] tokens; see `moe_engine.ops.sampling.sample_tokens`, which checks the arguments."""
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    if out is None:
        out = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    assert MAX_ROWS <= COUNTERS_PER_STREAM
    for start in range(0, len(logits_BV), MAX_ROWS):
        rows = slice(start, start + MAX_ROWS)
        _sample_rows(logits_BV[rows], params_5B[:, rows], out[rows], may_filter)
    return out


def _sample_rows(
    logits_BV: torch.Tensor, params_5B: torch.Tensor, tokens_B: torch.Tensor, may_filter: bool
) -> None:
    num_rows, vocab_size = logits_BV.shape
    device = logits_BV.device
    use_pdl = supports_pdl(device)
    counters = arrival_counters(device)

    def workspace(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=device)

    sizes = (vocab_size, logits_BV.stride(0), params_5B.stride(0))
    num_parts = triton.cdiv(vocab_size, PART)
    found_B2S = workspace(2, num_parts, dtype=torch.int64)
    state = workspace(NUM_FIELDS.value, dtype=torch.int64) if may_filter else None
    parts_per_program = triton.cdiv(num_parts, triton.cdiv(NUM_PROGRAMS, num_rows))

    launch_kernel(
        start_kernel, (triton.cdiv(num_parts, parts_per_program), num_rows),
        logits_BV, params_5B, state, found_B2S, counters, tokens_B, *sizes, parts_per_program,
        MAY_FILTER=may_filter, PART=PART, NUM_PARTS=num_parts,
        PADDED_PARTS=triton.next_power_of_2(num_parts),
        USE_PDL=use_pdl, launch_pdl=use_pdl, num_warps=NUM_WARPS,
        # Else a product and a sum might be one operation in one variant and two in the other.
        enable_fp_fusion=False,
    )  # fmt: skip
    if not may_filter:
        return
    num_segments = triton.cdiv(vocab_size, SEGMENT)
    grid = (num_segments, num_rows)
    pivots = NUM_PIVOTS.value
    launch = {"USE_PDL": use_pdl, "launch_pdl": use_pdl, "num_warps": 8}
    split = {
        "SEGMENT": SEGMENT,
        "NUM_SEGMENTS": num_segments,
        "PADDED_SEGMENTS": triton.next_power_of_2(num_segments),
    }
    counts_BPS = workspace(pivots, num_segments, dtype=torch.int64)
    masses_BPS = workspace(pivots, num_segments, dtype=torch.int64)
    listed_keys_BC = workspace(CAPACITY, dtype=torch.int32)
    listed_ids_BC = workspace(CAPACITY, dtype=torch.int32)
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
