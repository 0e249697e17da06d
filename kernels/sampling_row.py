"""What the sampling kernels know of a row: logits as keys, weights as integers, and its state.

**Keys.** Logits are compared through their keys (`kernels.floats`). NaN counts as -inf, +inf as the
largest float32. A cut of the row is a key, so it is exact, however many logits are equal.

**Weights.** The weight of a logit is ``exp((logit - largest) / temperature)`` in multiples of
2**-40, so the largest logit weighs 2**40 and one that is 27.8 temperatures below it nothing.
Integers add up to the same whatever the order, so a row's token does not depend on how many
programs share the row, nor on the rows beside it.

**State.** int64 [B, NUM_FIELDS]; what a search for the cut knows so far, handed from kernel to
kernel. ``mass(key)`` and ``count(key)`` are the weight and the number of logits from ``key`` up.

Legend: N * W logits of a tile, P pivots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .floats import LOG2_E, WEIGHT_ONE, keys_of, values_of

# Rows of the parameters, float64 [5, B].
TEMPERATURE = tl.constexpr(0)
TOP_K = tl.constexpr(1)
TOP_P = tl.constexpr(2)
MIN_P = tl.constexpr(3)
UNIFORM = tl.constexpr(4)

# What the row is searched for: nothing, a number of logits, or a weight.
DONE = tl.constexpr(0)
BY_COUNT = tl.constexpr(1)
BY_MASS = tl.constexpr(2)

# Fields of the state.
IS_DRAWN = tl.constexpr(0)  # whether the token is still to be drawn; else it is final
SEARCH = tl.constexpr(1)  # DONE, BY_COUNT or BY_MASS
LARGEST = tl.constexpr(2)  # key of the largest logit
LOW = tl.constexpr(3)  # the cut is a key in [LOW, HIGH)
HIGH = tl.constexpr(4)
ABOVE = tl.constexpr(5)  # count(HIGH) or mass(HIGH), whichever is searched
NUM_ABOVE = tl.constexpr(6)  # count(HIGH)
TARGET = tl.constexpr(7)  # the cut is the largest key whose count or mass reaches it
IS_GATHERED = tl.constexpr(8)  # whether the logits in [LOW, HIGH) are listed
NUM_GATHERED = tl.constexpr(9)
CUT = tl.constexpr(10)  # what is larger stays, what is smaller goes
LAST_ID = tl.constexpr(11)  # of logits equal to the cut those with ids up to here stay
NUM_FIELDS = tl.constexpr(16)  # a cache line

LARGEST_FINITE = tl.constexpr(3.4028234663852886e38)
LARGEST_FINITE_KEY = tl.constexpr(0x7F7FFFFF)
MINUS_INF_KEY = tl.constexpr(-0x7F800001)
LARGEST_ID = tl.constexpr(2**31 - 1)
# Logits that a thread reads at once.
WIDTH = tl.constexpr(4)


@triton.jit
def load_logits(row_ptr, ids, vocab_size):
    """Logits of any float dtype as float32, NaN as -inf; past the end of the row -inf."""
    logits = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(logits == logits, logits, float("-inf"))


@triton.jit
def load_keys(row_ptr, ids, vocab_size):
    """The keys of `load_logits`, +inf still above the largest float32."""
    return keys_of(load_logits(row_ptr, ids, vocab_size))


@triton.jit
def load_scale(params_ptr, params_stride):
    """`scale_of` a row's temperature; ``params_ptr``: of the row."""
    return scale_of(tl.load(params_ptr + TEMPERATURE * params_stride))


@triton.jit
def scale_of(temperature):
    """log2(e) / temperature (float64 > 0) in float32, the steepness of the weights."""
    temperature = temperature.to(tl.float32)
    return (LOG2_E.value / temperature.to(tl.float64)).to(tl.float32)


@triton.jit
def weights_of(keys, largest, scale):
    """int64 weights of int32 keys.

    The difference comes first, because it is exact where it matters: between close logits.

    Example: keys of 3 and 2, largest key that of 3, temperature 0.5: 2**40 and 2**40 * exp(-2).
    """
    return weights_of_values(values_of(keys), values_of(largest), scale)


@triton.jit
def weights_of_values(values, largest, scale):
    """`weights_of` of float32 values themselves; ``largest`` is finite."""
    return (tl.exp2((values - largest) * scale) * WEIGHT_ONE).to(tl.int64)


@triton.jit
def share_of(share, total):
    """The smallest integer that is not below ``share`` (float64, below 1) of ``total`` (int64)."""
    exact = share * total.to(tl.float64)
    rounded = exact.to(tl.int64)
    # A total above 2**53 may have been rounded up.
    return tl.minimum(rounded + (rounded.to(tl.float64) < exact).to(tl.int64), total)


@triton.jit
def tally(
    values_ptr,
    ids_ptr,
    first,
    last,
    pivots_P,
    largest,
    scale,
    tied_key,
    BLOCK: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    IS_LISTED: tl.constexpr,
    WITH_MASS: tl.constexpr,
    BY_ID: tl.constexpr,
):
    """How many keys of elements ``first`` to ``last - 1`` reach each pivot, and their weights.

    Args:
        values_ptr: the row's logits, or if IS_LISTED int32 keys, which ``ids_ptr`` has the ids of.
        pivots_P: int32, keys above that of -inf.
        largest, scale: of the weights.
        tied_key: if BY_ID, an element counts as its id times -1 where its key is ``tied_key``,
            and as less than any id elsewhere.

    Returns:
        int64 [P] counts and int64 [P] masses, which are 0 unless WITH_MASS.
    """
    pivots_P11 = pivots_P[:, None, None]
    # A thread adds up its W elements at once, so that it keeps P sums and not W times as many.
    lanes_1NW = (
        tl.arange(0, BLOCK // WIDTH)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    )
    counts_PN = tl.zeros([NUM_PIVOTS, BLOCK // WIDTH], tl.int32)
    masses_PN = tl.zeros([NUM_PIVOTS, BLOCK // WIDTH], tl.int64)
    for start in range(first, last, BLOCK):
        places_1NW = start + lanes_1NW
        if IS_LISTED:
            exists_1NW = places_1NW < last
            keys_1NW = tl.load(values_ptr + places_1NW, mask=exists_1NW, other=MINUS_INF_KEY)
        else:
            keys_1NW = tl.minimum(load_keys(values_ptr, places_1NW, last), LARGEST_FINITE_KEY)
        if BY_ID:
            if IS_LISTED:
                ids_1NW = tl.load(ids_ptr + places_1NW, mask=exists_1NW, other=0)
            else:
                ids_1NW = places_1NW
            keys_1NW = tl.where(keys_1NW == tied_key, -ids_1NW, MINUS_INF_KEY)
        reaches_PNW = keys_1NW >= pivots_P11
        counts_PN += tl.sum(reaches_PNW.to(tl.int32), axis=2)
        if WITH_MASS:
            weights_PNW = tl.where(reaches_PNW, weights_of(keys_1NW, largest, scale), 0)
            masses_PN += tl.sum(weights_PNW, axis=2)
    return tl.sum(counts_PN, axis=1).to(tl.int64), tl.sum(masses_PN, axis=1)


@triton.jit
def pick(values_P, index, beyond, NUM_PIVOTS: tl.constexpr):
    """``values_P[index]``, or ``beyond`` where ``index`` is P."""
    indices_P = tl.arange(0, NUM_PIVOTS)
    picked = tl.sum(tl.where(indices_P == index, values_P, 0), axis=0)
    return tl.where(index < NUM_PIVOTS, picked, beyond)
