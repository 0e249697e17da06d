"""Random numbers as hashes of indices: any slice of a tensor can be drawn alone, on any device.

Every element is splitmix64's finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
Generators, OOPSLA 2014) chained over the element's index in the full tensor, one link per
dimension, in 64-bit arithmetic that wraps::

    hash = mix(mix(key + (row + 1) * GAMMA) + (column + 1) * GAMMA)

Its upper 23 bits u become the float32 ``(2 * u + 1 - 2^23) * scale``, without rounding before the
product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moe_engine.ops import native
from moe_engine.ops.reference import fill as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MANTISSA_BITS = 23


@dataclass(frozen=True, slots=True)
class HashedFill:
    """A tensor to fill.

    Attributes:
        target: float32, bfloat16 or float16, at least one dimension.
        key: signed 64-bit, names the random tensor.
        starts: index in the full tensor of the target's first element, one per dimension.
    """

    target: torch.Tensor
    key: int
    starts: tuple[int, ...]


def fill_hashed(fills: Iterable[HashedFill], std: float) -> None:
    """Fill tensors with a uniform distribution of mean 0; the same values on every device.

    Vectors and matrices on a GPU take one launch for all of the same shape.

    Args:
        std: standard deviation; the values lie in ``(-sqrt(3) * std, sqrt(3) * std)``, rounded to
            the target's dtype.

    Raises:
        ValueError: a target's dtype or dimensions do not fit.
    """
    scale = math.sqrt(3.0) * std / (1 << _MANTISSA_BITS)
    alike: dict[tuple[object, ...], list[HashedFill]] = {}
    for fill in fills:
        target = fill.target
        if target.dtype not in DTYPES or not target.dim() == len(fill.starts) > 0:
            raise ValueError(
                f"target is {target.dtype} {list(target.shape)}, starts are {fill.starts}; it must "
                "be float32, bfloat16 or float16 with one start for each dimension"
            )
        if target.is_cuda and target.dim() <= 2 and target.stride(-1) == 1 and native.has_triton():
            key = (target.shape, target.stride(), target.dtype, target.device)
            alike.setdefault(key, []).append(fill)
        else:
            reference.hash_fill(target, fill.key, fill.starts, scale)
    for group in alike.values():
        if group[0].target.numel():
            _fill_alike(group, scale)


def _fill_alike(fills: list[HashedFill], scale: float) -> None:
    """Fill vectors or matrices of one shape, layout, dtype and device with one launch."""
    from moe_engine.kernels import hash_fill as kernels

    like = fills[0].target
    is_matrix = like.dim() == 2
    rows = like if is_matrix else like[None]
    table = [
        (fill.target.data_ptr(), fill.key, *(fill.starts if is_matrix else (0, *fill.starts)))
        for fill in fills
    ]
    table_F4 = torch.tensor(table, dtype=torch.int64, device=like.device)
    with torch.cuda.device_of(like):
        kernels.hash_fill(table_F4, rows, rows.stride(0), scale, hash_rows=is_matrix)
