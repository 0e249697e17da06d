"""The linear layer.

Shape legend: T tokens, X input width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_engine.ops import hopper


def linear(
    x_TX: torch.Tensor, weight_OX: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """``x weight^T + bias``, [T, O]; the vendor's library but for a few tokens on Hopper."""
    assert x_TX.shape[1] == weight_OX.shape[1], (x_TX.shape, weight_OX.shape)
    if bias_O is None and x_TX.is_cuda and hopper.takes_linear(x_TX, weight_OX):
        return hopper.linear(x_TX, weight_OX)
    return F.linear(x_TX, weight_OX, bias_O)
