"""Rotary position embedding, computed once a step for all layers."""

from __future__ import annotations

import torch

from moe_engine.layers.context import LayerContext, RopeTable
from moe_engine.ops.rope import rope_cos_sin, rope_frequencies


class Rotary:
    """Makes the step's cos and sin from the model's RoPE or YaRN parameters."""

    def __init__(self, context: LayerContext) -> None:
        frequencies, self._scale = rope_frequencies(context.model.rope, context.model.head_dim)
        self._frequencies = frequencies.to(context.device)
        self._dtype = context.dtype

    def __call__(self, positions_T: torch.Tensor) -> RopeTable:
        """cos and sin of int64 positions."""
        return RopeTable(*rope_cos_sin(positions_T, self._frequencies, self._scale, self._dtype))
