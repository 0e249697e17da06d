"""Launch constants of `paged_prefill`, measured with ``benchmarks.bench_attention --tune``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class PrefillTiles:
    """How a program is cut.

    Attributes:
        rows: (token, query head) pairs, at least 16.
        keys: tokens that are loaded at a time.
        num_stages: 1 + tiles of keys and values in flight.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def prefill_tiles(head_dim: int, dtype: torch.dtype) -> PrefillTiles:
    """The committed tiles: of half-precision heads of 128, else what fits into shared memory."""
    wide = triton.next_power_of_2(head_dim) > 128
    if dtype.itemsize == 4:
        return PrefillTiles(rows=16 if wide else 32, keys=16, num_warps=4, num_stages=2)
    if wide:
        return PrefillTiles(rows=64, keys=32, num_warps=8, num_stages=2)
    return PrefillTiles(rows=128, keys=64, num_warps=8, num_stages=3)
