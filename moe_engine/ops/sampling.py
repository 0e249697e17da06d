"""Sampling operators over batches of logits; every device runs the torch reference."""

from moe_engine.ops.reference.sampling import (
    apply_output_penalties,
    apply_repetition_penalty,
    draw_tokens,
    greedy_tokens,
    mask_min_p,
    mask_top_k,
    mask_top_p,
    scale_by_temperature,
    to_float32_without_nan,
    top_logprobs,
)

__all__ = [
    "apply_output_penalties",
    "apply_repetition_penalty",
    "draw_tokens",
    "greedy_tokens",
    "mask_min_p",
    "mask_top_k",
    "mask_top_p",
    "scale_by_temperature",
    "to_float32_without_nan",
    "top_logprobs",
]
