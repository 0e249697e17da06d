"""Random numbers as pure functions: the same request draws the same numbers in any batch.

The mixer is SplitMix64's (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
OOPSLA 2014): a Weyl sequence with the odd constant ``GOLDEN`` through a 64-bit finalizer.
"""

from __future__ import annotations

from functools import lru_cache

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers (others are taken modulo 2**64)."""
    value &= MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK64
    return value ^ (value >> 31)


def draw64(seed: int, index: int) -> int:
    """Output ``index`` (from 0) of the stream that ``seed`` names, in [0, 2**64).

    The seed is mixed before it starts the Weyl sequence, so neighbouring seeds do not yield
    shifted copies of one stream.
    """
    return mix64(_stream(seed) + (index + 1) * GOLDEN)


@lru_cache(maxsize=4096)
def _stream(seed: int) -> int:
    """Where a seed's Weyl sequence starts; a running request asks in every step."""
    return mix64(seed)


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1), a multiple of 2**-53, that decides output token ``index`` (from 0)."""
    return (draw64(seed, index) >> 11) * 2.0**-53
