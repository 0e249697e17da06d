"""The linear layer.

Shape legend: T tokens, X input width, O output width, S parts of the depth X.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe_engine.ops import hopper

MANY_ROWS = 512
"""Of more rows the memory traffic decides, so kernels that save a pass over them take over."""


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


@dataclass(frozen=True)
class AddedOutput:
    """A layer's output that is part of the residual stream already.

    Attributes:
        stream_TO: the residual stream with the output.
    """

    stream_TO: torch.Tensor


def linear(
    x_TX: torch.Tensor, weight_OX: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """``x weight^T + bias``, [T, O]; the vendor's library but for a few tokens on Hopper."""
    _check(x_TX, weight_OX)
    if bias_O is None and x_TX.is_cuda and hopper.takes_linear(x_TX, weight_OX):
        return hopper.linear(x_TX, weight_OX)
    return F.linear(x_TX, weight_OX, bias_O)


def unsummed_linear(x_TX: torch.Tensor, weight_OX: torch.Tensor) -> torch.Tensor | SplitSums:
    """``x weight^T``, [T, O], in parts where that is faster."""
    _check(x_TX, weight_OX)
    if x_TX.is_cuda and hopper.takes_split_linear(x_TX, weight_OX):
        return SplitSums(hopper.split_linear(x_TX, weight_OX), x_TX.dtype)
    return linear(x_TX, weight_OX)


def linear_onto(
    x_TX: torch.Tensor, weight_OX: torch.Tensor, residual_TO: torch.Tensor
) -> torch.Tensor | SplitSums | AddedOutput:
    """`unsummed_linear`, or for many rows on a GPU what it makes added to ``residual_TO`` in place.

    The sum is rounded once, where an addition that follows rounds the product and then the sum.

    Args:
        residual_TO: contiguous; nobody else needs what it holds.
    """
    assert residual_TO.shape == (x_TX.shape[0], weight_OX.shape[0]), (residual_TO.shape, x_TX.shape)
    if adds_in_place(x_TX):
        # Not to a new tensor, into which `torch.addmm` first copies what it adds to.
        return AddedOutput(residual_TO.addmm_(x_TX, weight_OX.t()))
    return unsummed_linear(x_TX, weight_OX)


def adds_in_place(x_TX: torch.Tensor) -> bool:
    """Whether the vendor's library adds the product of these rows to the residual stream."""
    return x_TX.is_cuda and len(x_TX) > MANY_ROWS and x_TX.dtype in (torch.bfloat16, torch.float16)


def _check(x_TX: torch.Tensor, weight_OX: torch.Tensor) -> None:
    assert x_TX.dim() == weight_OX.dim() == 2, (x_TX.shape, weight_OX.shape)
    assert x_TX.shape[1] == weight_OX.shape[1], (x_TX.shape, weight_OX.shape)
    assert x_TX.dtype == weight_OX.dtype, (x_TX.dtype, weight_OX.dtype)
