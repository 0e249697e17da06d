"""Makes operators choose otherwise than by their GPU's table, to time kernels side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_engine.ops import tuning
from moe_engine.ops.tuning import Choices


@contextmanager
def forced_choices(
    device: torch.device, shape: tuple[int, ...], choices: Choices
) -> Iterator[None]:
    """Choose by these inside, for one shape; what is captured there as a CUDA graph stays."""
    kind = type(choices)
    present = tuning.choices(kind, device, *shape)
    table = tuning.table(device)
    table[kind, shape] = choices
    try:
        yield
    finally:
        table[kind, shape] = present
