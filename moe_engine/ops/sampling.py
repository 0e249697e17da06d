"""Sampling operators over batches of logits; only the greedy choice has a kernel."""

from __future__ import annotations

import torch

from moe_engine.ops import native
from moe_engine.ops.reference import sampling as reference
from moe_engine.ops.reference.sampling import (
    apply_output_penalties,
    apply_repetition_penalty,
    draw_tokens,
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


def greedy_tokens(logits_BV: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row, int64 [B]; the lowest id where several are.

    Args:
        logits_BV: any float dtype, V >= 1; NaN counts as -inf, and a row of -inf alone gives 0.
    """
    if logits_BV.is_cuda and native.has_triton():
        from moe_engine.kernels import greedy as kernels

        with torch.cuda.device(logits_BV.device):
            tokens_B: torch.Tensor = kernels.greedy_tokens(logits_BV)
        return tokens_B
    return reference.greedy_tokens(logits_BV)
