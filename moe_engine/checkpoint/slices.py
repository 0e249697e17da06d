"""Reads a slice of a stored tensor: exactly the bytes asked for, none beside them."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable

import torch

from moe_engine.checkpoint.header import WEIGHT_DTYPES, StoredTensor
from moe_engine.errors import CheckpointError

# (file descriptor, buffer to fill, byte offset) -> bytes read; 0 at the end of the file
ReadInto = Callable[[int, memoryview, int], int]


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from byte ``offset`` of the file, as far as one system call goes."""
    return os.preadv(fd, [buffer], offset)


def slice_shape(tensor: StoredTensor, slices: tuple[slice, ...]) -> tuple[int, ...]:
    """The shape of ``tensor[slices]``."""
    return tuple(stop - start for start, stop in _bounds(tensor, slices))


def slice_bytes(tensor: StoredTensor, slices: tuple[slice, ...]) -> int:
    """Bytes that ``tensor[slices]`` takes in the file."""
    return math.prod(slice_shape(tensor, slices)) * tensor.item_size


def read_slice(
    fd: int,
    tensor: StoredTensor,
    slices: tuple[slice, ...],
    read_into: ReadInto = pread_into,
) -> torch.Tensor:
    """Read ``tensor[slices]`` into a new CPU tensor of the stored dtype.

    Args:
        fd: an open descriptor of ``tensor.file``.
        slices: one slice of step 1 per dimension.

    Raises:
        CheckpointError: the file ends early or the system reports an error.
    """
    bounds = _bounds(tensor, slices)
    result = torch.empty(
        [stop - start for start, stop in bounds], dtype=WEIGHT_DTYPES[tensor.dtype]
    )
    if result.numel() == 0:
        return result
    buffer = result.view(-1).view(torch.uint8).numpy().data
    run_dims, run_items = _contiguous_run(tensor.shape, bounds)
    strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(len(bounds))]
    first = sum(bounds[dim][0] * strides[dim] for dim in range(run_dims, len(bounds)))
    run_bytes = run_items * tensor.item_size
    outer = (range(*bounds[dim]) for dim in range(run_dims))
    for run, index in enumerate(itertools.product(*outer)):
        start = first + sum(i * stride for i, stride in zip(index, strides, strict=False))
        _read_exactly(
            fd,
            tensor,
            buffer[run * run_bytes : (run + 1) * run_bytes],
            tensor.offset + start * tensor.item_size,
            read_into,
        )
    return result


def _bounds(tensor: StoredTensor, slices: tuple[slice, ...]) -> list[tuple[int, int]]:
    """``(start, stop)`` per dimension."""
    assert len(slices) == len(tensor.shape), (slices, tensor)
    bounds = []
    for part, size in zip(slices, tensor.shape, strict=True):
        start = 0 if part.start is None else part.start
        stop = size if part.stop is None else part.stop
        assert part.step in (None, 1), (slices, tensor)
        assert 0 <= start <= stop <= size, (slices, tensor)
        bounds.append((start, stop))
    return bounds


def _contiguous_run(shape: tuple[int, ...], bounds: list[tuple[int, int]]) -> tuple[int, int]:
    """``(d, n)``: over dimensions ``d`` and up the slice is one run of ``n`` elements."""
    dim, items = len(shape), 1
    while dim > 0:
        dim -= 1
        start, stop = bounds[dim]
        items *= stop - start
        if stop - start < shape[dim]:
            break
    return dim, items


def _read_exactly(
    fd: int, tensor: StoredTensor, buffer: memoryview, offset: int, read_into: ReadInto
) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = read_into(fd, buffer[done:], offset + done)
        except OSError as error:
            raise CheckpointError(f"{tensor.file} cannot be read: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(
                f"{tensor.file} ends before byte {tensor.end}, up to which a tensor goes; it has "
                "changed since its header was read"
            )
        done += count
