"""Rotary position embedding: one table of cos and sin for all layers and steps."""

from __future__ import annotations

from moe_engine.layers.context import LayerContext
from moe_engine.ops.rope import RopeTable, rope_cos_sin, rope_frequencies


def make_rope_table(context: LayerContext) -> RopeTable:
    """cos and sin of every position of the model's context, from its RoPE or YaRN parameters."""
    model = context.model
    frequencies, scale = rope_frequencies(model.rope, model.head_dim)
    frequencies = frequencies.to(context.device)
    return RopeTable(*rope_cos_sin(model.max_position_embeddings, frequencies, scale))
