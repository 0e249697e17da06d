"""Rotary position embedding; every device runs the torch reference."""

from moe_engine.ops.reference.rope import apply_rope, rope_cos_sin, rope_frequencies

__all__ = ["apply_rope", "rope_cos_sin", "rope_frequencies"]
