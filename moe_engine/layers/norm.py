"""RMSNorm with a weight, as Qwen3 uses it on hidden states and on query and key heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.layers.context import LayerContext
from moe_engine.ops.linear import AddedOutput, SplitSums
from moe_engine.ops.moe import ExpertOutputs, MoEOutput, sum_add_rms_norm
from moe_engine.ops.norm import PendingRows, add_rms_norm, rms_norm, split_add_rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (https://arxiv.org/abs/1910.07467).

    Attributes:
        weight: [width].
        eps: added to the mean of the squares.
    """

    def __init__(self, context: LayerContext, width: int) -> None:
        super().__init__()
        self.eps = context.model.rms_norm_eps
        self.weight = context.parameter(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` [..., width]."""
        return rms_norm(x, self.weight, self.eps)

    def after_adding(
        self, x: MoEOutput | SplitSums | AddedOutput, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(normalised residual + x, residual + x)``, each [..., width].

        Args:
            x: what the block before made, what is still to be summed to that, or the residual
                stream that has it already.
        """
        if isinstance(x, AddedOutput):
            return self(x.stream_TO), x.stream_TO
        if isinstance(x, PendingRows):
            return x.add_rms_norm(residual, self.weight, self.eps)
        if isinstance(x, ExpertOutputs):
            return sum_add_rms_norm(x, residual, self.weight, self.eps)
        if isinstance(x, SplitSums):
            return split_add_rms_norm(x, residual, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """What to read from the checkpoint."""
        yield WeightSpec(f"{prefix}weight", (slice(0, self.weight.shape[0]),), self.weight.data)
