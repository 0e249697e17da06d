"""Integers of the host to the device, many arrays in one transfer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 4
"""Every array starts at a multiple of 16 bytes, for which kernels are specialised."""


def stage(
    arrays: Sequence[np.ndarray | Sequence[int]],
    device: torch.device,
    dtype: torch.dtype = torch.int32,
) -> list[torch.Tensor]:
    """Copies of one-dimensional arrays on the device, in order; nobody waits for them.

    The transfer starts from pinned memory of torch's caching allocator, which hands it out again
    only when the transfer is over.
    """
    sizes = [len(array) for array in arrays]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    host = torch.empty(starts[-1], dtype=dtype, pin_memory=device.type == "cuda")
    values = host.numpy()
    for array, start, size in zip(arrays, starts, sizes, strict=False):
        values[start : start + size] = array
    packed = host.to(device, non_blocking=True)
    return [packed[start : start + size] for start, size in zip(starts, sizes, strict=False)]
