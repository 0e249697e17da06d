"""Qwen3-MoE (https://arxiv.org/abs/2505.09388), composed from layers.

Shape legend: T tokens, H hidden size, V vocabulary, R rows that need logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moe_engine.checkpoint.spec import WeightSpec
from moe_engine.layers.attention import Attention
from moe_engine.layers.context import ForwardContext, LayerContext
from moe_engine.layers.embedding import OutputHead, VocabEmbedding
from moe_engine.layers.mlp import DenseMLP
from moe_engine.layers.moe import SparseMoE
from moe_engine.layers.norm import RMSNorm
from moe_engine.layers.rotary import make_rope_table
from moe_engine.ops.linear import SplitSums
from moe_engine.ops.moe import ExpertOutputs
from moe_engine.ops.rope import RopeTable

LayerOutput = torch.Tensor | ExpertOutputs | SplitSums
"""[T, H], or what is still to be summed to that."""


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

    def forward(
        self,
        x_TH: LayerOutput,
        residual_TH: torch.Tensor | None,
        rope: RopeTable,
        step: ForwardContext,
    ) -> tuple[LayerOutput, torch.Tensor]:
        """The feed-forward's output, not yet added, and the residual stream it belongs to.

        Args:
            x_TH: what the previous layer returned first; before the first layer the embeddings.
            residual_TH: what it returned second; None before the first layer.
        """
        if residual_TH is None:
            assert isinstance(x_TH, torch.Tensor)
            normed_TH, residual_TH = self.input_layernorm(x_TH), x_TH
        else:
            normed_TH, residual_TH = self.input_layernorm.after_adding(x_TH, residual_TH)
        attended_TH = self.self_attn(normed_TH, rope, step)
        return self.mlp(attended_TH, residual_TH, self.post_attention_layernorm, step)

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
        self._rope = make_rope_table(context)

    def forward(self, token_ids_T: torch.Tensor, step: ForwardContext) -> torch.Tensor:
        """Final hidden states [T, H]; a collective over the world, T may be 0."""
        x_TH, residual_TH = self.embed_tokens(token_ids_T), None
        for layer in self.layers:
            x_TH, residual_TH = layer(x_TH, residual_TH, self._rope, step)
        assert residual_TH is not None
        normed_TH, _ = self.norm.after_adding(x_TH, residual_TH)
        return normed_TH

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
