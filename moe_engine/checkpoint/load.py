"""Fills the targets of `WeightSpec`s from a checkpoint, file by file in the order of the bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from tqdm import tqdm

from moe_engine.checkpoint.reader import Checkpoint
from moe_engine.checkpoint.slices import ReadInto, pread_into, read_slice, slice_bytes, slice_shape
from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.errors import CheckpointError

PROGRESS_BAR_DELAY_S = 3.0


@torch.no_grad()
def load_weights(
    specs: Iterable[WeightSpec],
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] | None = None,
    *,
    show_progress: bool = False,
    read_into: ReadInto = pread_into,
) -> int:
    """Read every spec's slices and copy them, converted, into its target.

    Args:
        progress: called with (bytes read, bytes in all) after every tensor.
        show_progress: draw a bar with the rate on stderr once the load has taken a few seconds;
            for one rank only.
        read_into: reads bytes of an open file; tests count them here.

    Returns:
        Bytes read.

    Raises:
        CheckpointError: a file changed or failed since its header was read.
    """
    wanted = list(specs)
    for spec in wanted:
        shape = slice_shape(checkpoint.tensors[spec.name], spec.slices)
        assert spec.target.shape == shape, f"{spec.name}: {spec.target.shape} for {shape}"
    wanted.sort(key=lambda spec: _position(checkpoint, spec))
    total = sum(slice_bytes(checkpoint.tensors[spec.name], spec.slices) for spec in wanted)
    done = 0
    with tqdm(
        total=total,
        desc="loading weights",
        unit="B",
        unit_scale=True,
        delay=PROGRESS_BAR_DELAY_S,
        disable=not show_progress,
    ) as bar:
        for file, group in groupby(wanted, lambda spec: checkpoint.tensors[spec.name].file):
            try:
                fd = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
            try:
                for spec in group:
                    stored = checkpoint.tensors[spec.name]
                    spec.target.copy_(read_slice(fd, stored, spec.slices, read_into))
                    num_bytes = slice_bytes(stored, spec.slices)
                    done += num_bytes
                    bar.update(num_bytes)
                    if progress is not None:
                        progress(done, total)
            finally:
                os.close(fd)
    return done


def _position(checkpoint: Checkpoint, spec: WeightSpec) -> tuple[str, int]:
    stored = checkpoint.tensors[spec.name]
    return str(stored.file), stored.offset
