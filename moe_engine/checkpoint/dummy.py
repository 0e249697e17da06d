"""Deterministic random weights, for running without a checkpoint.

Every element is a hash of the seed, the tensor's name and the element's index in the full tensor,
so a rank fills its slice with what it would have read from one shared checkpoint: the same seed
is the same model under every layout, on every device and machine. The hash is splitmix64's
finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), in
int64 arithmetic that wraps; its upper 23 bits become a float32 without rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from moe_engine.checkpoint.spec import WeightSpec

# splitmix64's constants, as signed 64-bit numbers
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_MANTISSA_BITS = 23
_CHUNK_ELEMENTS = 1 << 18  # int64 scratch tensors of 2 MiB stay in a CPU's cache


@torch.no_grad()
def fill_dummy(specs: Iterable[WeightSpec], seed: int, std: float = 0.02) -> None:
    """Fill every target with a uniform distribution of mean 0; norm weights become 1.

    Args:
        seed: any integer; another seed is another model.
        std: standard deviation of weights and biases.
    """
    for spec in specs:
        if spec.name.endswith("norm.weight"):
            spec.target.fill_(1.0)
        else:
            starts = tuple(part.start or 0 for part in spec.slices)
            fill_uniform(spec.target, seed, spec.name, starts, std)


def fill_uniform(
    target: torch.Tensor, seed: int, name: str, starts: tuple[int, ...], std: float
) -> None:
    """Fill ``target`` with elements ``[starts, starts + target.shape)`` of a random tensor.

    Args:
        target: any floating dtype, at least one dimension; values are rounded to it.
        name: names the random tensor, together with ``seed``.
        starts: index in the full tensor of the target's first element.
        std: standard deviation; the values lie in ``(-sqrt(3) * std, sqrt(3) * std)``.
    """
    if target.numel() == 0:
        return
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = int.from_bytes(digest[:8], "little", signed=True)
    scale = math.sqrt(3.0) * std / (1 << _MANTISSA_BITS)
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
