"""The linear layer.

Shape legend: T tokens, X input width, O output width, S parts of the depth X.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe_engine.ops import hopper


@dataclass(frozen=True)
class SplitSums:
    """A layer's output in parts, whose sum the operator that follows takes.

    Attributes:
        parts_STO: float32, to be added in order.
        dtype: what the sum is rounded to.
    """

    parts_STO: torch.Tensor
    dtype: torch.dtype

    def summed(self) -> torch.Tensor:
        """[T, O]; several launches, for where nothing fuses the sum."""
        total_TO = self.parts_STO[0]
        for part_TO in self.parts_STO[1:]:
            total_TO = total_TO + part_TO
        return total_TO.to(self.dtype)


def linear(
    x_TX: torch.Tensor, weight_OX: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """``x weight^T + bias``, [T, O]; the vendor's library but for a few tokens on Hopper."""
    assert x_TX.shape[1] == weight_OX.shape[1], (x_TX.shape, weight_OX.shape)
    if bias_O is None and x_TX.is_cuda and hopper.takes_linear(x_TX, weight_OX):
        return hopper.linear(x_TX, weight_OX)
    return F.linear(x_TX, weight_OX, bias_O)


def unsummed_linear(x_TX: torch.Tensor, weight_OX: torch.Tensor) -> torch.Tensor | SplitSums:
    """``x weight^T``, [T, O], in parts where that is faster."""
    assert x_TX.shape[1] == weight_OX.shape[1], (x_TX.shape, weight_OX.shape)
    if x_TX.is_cuda and hopper.takes_split_linear(x_TX, weight_OX):
        return SplitSums(hopper.split_linear(x_TX, weight_OX), x_TX.dtype)
    return linear(x_TX, weight_OX)
