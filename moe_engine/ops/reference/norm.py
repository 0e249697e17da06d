"""RMSNorm in PyTorch (https://arxiv.org/abs/1910.07467), step for step Hugging Face's.

Legend: T tokens, H the normalised size; any leading shape may stand for T.
"""

from __future__ import annotations

import torch


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise in float32, round to the input's dtype, then multiply by the weight."""
    x32_TH = x_TH.float()
    mean_square_T1 = x32_TH.pow(2).mean(-1, keepdim=True)
    return weight_H * (x32_TH * torch.rsqrt(mean_square_T1 + eps)).to(x_TH.dtype)


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual + x`` rounded to the dtype, and that sum normalised."""
    new_residual_TH = residual_TH + x_TH
    return rms_norm(new_residual_TH, weight_H, eps), new_residual_TH
