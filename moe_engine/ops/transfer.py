"""Numbers of the host on their way to a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT_BYTES = 16
"""Where arrays start that travel together: kernels are specialised for such addresses."""


def to_device(
    values: Sequence[float] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of host numbers; pinned, because a copy from pageable memory would wait."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def stage(
    arrays: Sequence[np.ndarray | Sequence[int]],
    device: torch.device,
    dtype: torch.dtype = torch.int32,
) -> list[torch.Tensor]:
    """Copies of one-dimensional arrays on the device, in order and in one transfer.

    Nobody waits for it: it starts from pinned memory of torch's caching allocator, which hands
    that out again only when the transfer is over.
    """
    alignment = _ALIGNMENT_BYTES // dtype.itemsize
    sizes = [len(array) for array in arrays]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // alignment) * alignment)
    host = torch.empty(starts[-1], dtype=dtype, pin_memory=device.type == "cuda")
    values = host.numpy()
    for array, start, size in zip(arrays, starts, sizes, strict=False):
        values[start : start + size] = array
    packed = host.to(device, non_blocking=True)
    return [packed[start : start + size] for start, size in zip(starts, sizes, strict=False)]
