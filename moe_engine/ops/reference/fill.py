"""Reference of `ops.fill`: a hash of every element's index, in int64 arithmetic that wraps."""

from __future__ import annotations

import torch

# splitmix64's constants, as signed 64-bit numbers
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_MANTISSA_BITS = 23
_CHUNK_ELEMENTS = 1 << 18  # int64 scratch tensors of 2 MiB stay in a CPU's cache


def hash_fill(target: torch.Tensor, key: int, starts: tuple[int, ...], scale: float) -> None:
    """Fill one tensor of at least one dimension; see `ops.fill.fill_hashed`."""
    if target.numel() == 0:
        return
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // target[0].numel())
    for first in range(0, target.shape[0], rows_per_chunk):
        chunk = target[first : first + rows_per_chunk]
        bits = _hash_indices(chunk, key, (starts[0] + first, *starts[1:]))
        # odd numbers in (-2^23, 2^23): symmetric around 0 and exact in float32
        odd = 2 * _shift_right(bits, 64 - _MANTISSA_BITS) + 1 - (1 << _MANTISSA_BITS)
        chunk.copy_(odd.to(torch.float32) * scale)


def _hash_indices(like: torch.Tensor, key: int, starts: tuple[int, ...]) -> torch.Tensor:
    """int64 hashes, of ``like``'s shape, of the indices from ``starts`` on."""
    hashes = torch.tensor(key, dtype=torch.int64, device=like.device)
    for start, size in zip(starts, like.shape, strict=True):
        index = torch.arange(start + 1, start + size + 1, device=like.device)
        hashes = _mix(hashes.unsqueeze(-1) + index * _GAMMA)
    return hashes


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, count: int) -> torch.Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (z >> count) & ((1 << (64 - count)) - 1)
