"""Launch constants of `paged_decode`, measured with ``benchmarks.bench_attention --tune``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .launch import COUNTERS_PER_STREAM


@dataclass(frozen=True)
class DecodeTiles:
    """What the bits of the output depend on; a function of head_dim and the cache's dtype.

    Attributes:
        tile: tokens that a program loads at a time.
        num_warps: warps a program, among which a tile's sums are shared out.
        max_chunks: chunks of a context, at most.
    """

    tile: int
    num_warps: int = 4
    max_chunks: int = 16


@dataclass(frozen=True)
class DecodeLaunch:
    """How the work is shared out; the output's bits do not depend on it.

    Attributes:
        num_splits: programs for each (sequence, KV head), at most.
        min_tokens: tokens a program, at least, where a context is split.
        num_stages: 1 + tiles in flight.
        merge_unroll: chunks that a merging program has in flight.
        num_prefetched: tiles that a program calls into L2 before the kernel before it has ended.
    """

    num_splits: int
    min_tokens: int
    num_stages: int = 4
    merge_unroll: int = 8
    num_prefetched: int = 2


# (most pairs of sequence and KV head, launch): the first row that fits. A launch that splits
# contexts takes a counter for each pair.
LAUNCHES = (
    # So much shared memory: no block of the next kernel runs beside a program to slow it down.
    (8, DecodeLaunch(num_splits=16, min_tokens=64, num_stages=6)),
    (32, DecodeLaunch(num_splits=16, min_tokens=64, num_stages=2)),
    (80, DecodeLaunch(num_splits=8, min_tokens=64, num_stages=2)),
    (160, DecodeLaunch(num_splits=2, min_tokens=256, num_stages=3)),
    (512, DecodeLaunch(num_splits=2, min_tokens=2048, num_stages=3)),
    (COUNTERS_PER_STREAM, DecodeLaunch(num_splits=4, min_tokens=4096, num_stages=2)),
)
WIDEST_LAUNCH = DecodeLaunch(num_splits=1, min_tokens=1, num_stages=3)


def decode_tiles(head_dim: int, cache_dtype: torch.dtype) -> DecodeTiles:
    """The committed tiles: 16 KiB of keys, which is 64 tokens of 128 bfloat16 values."""
    row_bytes = triton.next_power_of_2(head_dim) * cache_dtype.itemsize
    num_warps = 8 if cache_dtype.itemsize == 1 else 4
    return DecodeTiles(tile=min(128, max(16, 16384 // row_bytes)), num_warps=num_warps)


def decode_launch(num_pairs: int) -> DecodeLaunch:
    """The committed launch for ``num_pairs`` = sequences × KV heads."""
    return next((row[1] for row in LAUNCHES if num_pairs <= row[0]), WIDEST_LAUNCH)
