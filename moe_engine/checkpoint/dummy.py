"""Deterministic random weights, for running without a checkpoint.

Every element is a hash of the seed, the tensor's name and the element's index in the full tensor
(`ops.fill`), so a rank fills its slice with what it would have read from one shared checkpoint:
the same seed is the same model under every layout, on every device and machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.ops.fill import HashedFill, fill_hashed


@torch.no_grad()
def fill_dummy(specs: Iterable[WeightSpec], seed: int, std: float = 0.02) -> None:
    """Fill every target with a uniform distribution of mean 0; norm weights become 1.

    Args:
        seed: any integer; another seed is another model.
        std: standard deviation of weights and biases.
    """
    fills = []
    for spec in specs:
        if spec.name.endswith("norm.weight"):
            spec.target.fill_(1.0)
        else:
            starts = tuple(part.start or 0 for part in spec.slices)
            fills.append(HashedFill(spec.target, tensor_key(seed, spec.name), starts))
    fill_hashed(fills, std)


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
    fill_hashed([HashedFill(target, tensor_key(seed, name), starts)], std)


def tensor_key(seed: int, name: str) -> int:
    """The signed 64-bit number that names a random tensor."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
