"""The dense feed-forward of layers without experts, cut over the attention-TP group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.layers.context import ForwardContext, LayerContext
from moe_engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from moe_engine.layers.norm import RMSNorm
from moe_engine.ops.linear import AddedOutput, SplitSums


class DenseMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        model, tp = context.model, context.groups.tp
        share = model.intermediate_size // tp.size
        rows = slice(tp.rank * share, (tp.rank + 1) * share)
        self.gate_up_proj = ColumnParallelLinear(
            context, model.hidden_size, [("gate_proj", rows), ("up_proj", rows)], bias=False
        )
        self.down_proj = RowParallelLinear(
            context, "down_proj", rows, model.hidden_size, bias=False
        )

    def forward(
        self,
        x: torch.Tensor | SplitSums | AddedOutput,
        residual_TH: torch.Tensor,
        norm: RMSNorm,
        step: ForwardContext,
    ) -> tuple[torch.Tensor | SplitSums, torch.Tensor]:
        """See `SparseMoE.forward`."""
        normed_TH, residual_TH = norm.after_adding(x, residual_TH)
        gate, up = self.gate_up_proj(normed_TH).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up), residual_TH

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """What to read from the checkpoint."""
        yield from self.gate_up_proj.weight_specs(prefix)
        yield from self.down_proj.weight_specs(prefix)
