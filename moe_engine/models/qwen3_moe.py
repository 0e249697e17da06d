"""Qwen3-MoE (https://arxiv.org/abs/2505.09388), composed from layers.

Shape legend: T tokens, H hidden size, V vocabulary, R rows that need logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.layers.attention import Attention
from moe_engine.layers.context import ForwardContext, LayerContext, RopeTable
from moe_engine.layers.embedding import OutputHead, VocabEmbedding
from moe_engine.layers.mlp import DenseMLP
from moe_engine.layers.moe import SparseMoE
from moe_engine.layers.norm import RMSNorm
from moe_engine.layers.rotary import Rotary


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, context: LayerContext, layer: int) -> None:
        super().__init__()
        hidden = context.model.hidden_size
        self.input_layernorm = RMSNorm(context, hidden)
        self.self_attn = Attention(context, layer)
        self.post_attention_layernorm = RMSNorm(context, hidden)
        is_moe = context.model.is_moe_layer(layer)
        self.mlp = SparseMoE(context) if is_moe else DenseMLP(context)

    def forward(self, x_TH: torch.Tensor, rope: RopeTable, step: ForwardContext) -> torch.Tensor:
        """The residual stream after this layer."""
        x_TH = x_TH + self.self_attn(self.input_layernorm(x_TH), rope, step)
        return x_TH + self.mlp(self.post_attention_layernorm(x_TH), step)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """What to read from the checkpoint."""
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
            yield from getattr(self, name).weight_specs(f"{prefix}{name}.")


class Qwen3MoeForCausalLM(nn.Module):
    """One rank's shard of the model."""

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        self.embed_tokens = VocabEmbedding(context, "embed_tokens")
        self.layers = nn.ModuleList(
            DecoderLayer(context, layer) for layer in range(context.model.num_hidden_layers)
        )
        self.norm = RMSNorm(context, context.model.hidden_size)
        self.lm_head = OutputHead(context, self.embed_tokens)
        self._rotary = Rotary(context)

    def forward(self, token_ids_T: torch.Tensor, step: ForwardContext) -> torch.Tensor:
        """Final hidden states [T, H]; a collective over the world, T may be 0."""
        rope = self._rotary(step.positions_T)
        x_TH = self.embed_tokens(token_ids_T)
        for layer in self.layers:
            x_TH = layer(x_TH, rope, step)
        return self.norm(x_TH)

    def logits(self, x_RH: torch.Tensor) -> torch.Tensor | None:
        """Logits [R, V] on the TP group's rank 0, None elsewhere (a collective over TP)."""
        logits: torch.Tensor | None = self.lm_head(x_RH)
        return logits

    def weight_specs(self) -> Iterator[WeightSpec]:
        """Every checkpoint slice that this rank needs."""
        yield from self.embed_tokens.weight_specs("model.")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.weight_specs(f"model.layers.{index}.")
        yield from self.norm.weight_specs("model.norm.")
        yield from self.lm_head.weight_specs("")
