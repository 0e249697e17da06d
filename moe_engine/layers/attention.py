"""Grouped-query attention with query and key norms, heads cut over the attention-TP group.

Shape legend: T tokens, R rows that are needed, H hidden size, N query heads here, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.config import ModelConfig
from moe_engine.layers.context import ForwardContext, LayerContext
from moe_engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from moe_engine.layers.norm import RMSNorm
from moe_engine.ops.attention import HeadNorms, attend
from moe_engine.ops.linear import AddedOutput, SplitSums
from moe_engine.ops.paged_batch import NeededRows
from moe_engine.ops.rope import RopeTable


def local_kv_heads(model: ModelConfig, tp_size: int, tp_rank: int) -> range:
    """The KV heads of a TP rank; ranks share a head when there are more ranks than heads.

    Example: 2 KV heads over 4 ranks: heads 0, 0, 1, 1.
    """
    if tp_size >= model.num_key_value_heads:
        head = tp_rank * model.num_key_value_heads // tp_size
        return range(head, head + 1)
    share = model.num_key_value_heads // tp_size
    return range(tp_rank * share, (tp_rank + 1) * share)


class Attention(nn.Module):
    """Self-attention of one decoder layer over the paged KV cache.

    Attributes:
        num_heads: query heads here.
    """

    def __init__(self, context: LayerContext, layer: int) -> None:
        super().__init__()
        model, tp = context.model, context.groups.tp
        self._layer = layer
        self._head_dim = model.head_dim
        self.num_heads = model.num_attention_heads // tp.size
        q_width = self.num_heads * model.head_dim
        q_rows = slice(tp.rank * q_width, (tp.rank + 1) * q_width)
        kv_heads = local_kv_heads(model, tp.size, tp.rank)
        kv_rows = slice(kv_heads.start * model.head_dim, kv_heads.stop * model.head_dim)
        self.qkv_proj = ColumnParallelLinear(
            context,
            model.hidden_size,
            [("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)],
            bias=model.attention_bias,
        )
        self.o_proj = RowParallelLinear(
            context, "o_proj", q_rows, model.hidden_size, bias=model.attention_bias
        )
        self.q_norm = RMSNorm(context, model.head_dim)
        self.k_norm = RMSNorm(context, model.head_dim)

    def forward(
        self,
        x_TH: torch.Tensor,
        rope: RopeTable,
        step: ForwardContext,
        needed: NeededRows | None,
        residual_RH: torch.Tensor,
    ) -> torch.Tensor | SplitSums | AddedOutput:
        """Attention output [R, H], the same on every rank of the TP group.

        Args:
            needed: the R rows of the output that are needed; None: all T of them.
            residual_RH: their residual stream, to which the output may be added in place.
        """
        out_RND = attend(
            self.qkv_proj.unsummed(x_TH),
            HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps),
            rope,
            step.positions_T,
            step.kv.layer(self._layer),
            step.batch,
            self._head_dim**-0.5,
            needed,
        )
        return self.o_proj.onto(out_RND.flatten(1), residual_RH)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """What to read from the checkpoint."""
        yield from self.qkv_proj.weight_specs(prefix)
        yield from self.o_proj.weight_specs(prefix)
        yield from self.q_norm.weight_specs(f"{prefix}q_norm.")
        yield from self.k_norm.weight_specs(f"{prefix}k_norm.")
