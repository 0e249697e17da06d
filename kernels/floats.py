"""What several kernels do with floats so that their results do not depend on an order.

**Keys.** Floats are compared through int32 keys that sort like them: the bits of a float32, with
all but the sign flipped if it is negative. So the largest of many is one integer maximum, and equal
floats have equal keys.

**Weights.** Exponentials are added up as multiples of 2**-40 of the largest one, int64: integers
add up to the same whatever the order.

Example: 0.0 and -0.0 have the key 0, 1.0 has 0x3F800000, -1.0 has -0x3F800001, and -inf has
-0x7F800001. A quarter of the largest exponential weighs 2**38.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(LOG2_E * x)
# Below the key of -inf.
LOWEST_KEY = tl.constexpr(-(2**31))
# The weight of the largest exponential, which is 1.
WEIGHT_ONE = tl.constexpr(2.0**40)


@triton.jit
def keys_of(values):
    """int32 keys of float32 values of any shape, no NaN; -0.0 counts as 0.0."""
    values = tl.where(values == 0.0, 0.0, values)
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def values_of(keys):
    """The float32 values of int32 keys of any shape."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
