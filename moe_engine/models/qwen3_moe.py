"""Qwen3-MoE (https://arxiv.org/abs/2505.09388), composed from layers.

Shape legend: T tokens, H hidden size, V vocabulary, R rows that need logits.
"""

from __future__ import annotations

import copy
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
from moe_engine.ops.moe import MoEOutput
from moe_engine.ops.paged_batch import NeededRows
from moe_engine.ops.rope import RopeTable

LayerOutput = MoEOutput | SplitSums
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
        needed: NeededRows | None,
    ) -> tuple[LayerOutput, torch.Tensor]:
        """The feed-forward's output, not yet added, and the residual stream it belongs to.

        Keys and values are cached of all rows, whichever are needed.

        Args:
            x_TH: what the previous layer returned first; before the first layer the embeddings.
            residual_TH: what it returned second; None before the first layer.
            needed: the rows to return, for which alone there is a feed-forward; None: all.
        """
        if residual_TH is None:
            assert isinstance(x_TH, torch.Tensor)
            normed_TH, residual_TH = self.input_layernorm(x_TH), x_TH
        else:
            normed_TH, residual_TH = self.input_layernorm.after_adding(x_TH, residual_TH)
        residual_RH = residual_TH
        if needed is not None:
            residual_RH = residual_TH.index_select(0, needed.rows_R)
        attended_RH = self.self_attn(normed_TH, rope, step, needed, residual_RH)
        return self.mlp(attended_RH, residual_RH, self.post_attention_layernorm, step)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """What to read from the checkpoint."""
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
            yield from getattr(self, name).weight_specs(f"{prefix}{name}.")


class Qwen3MoeForCausalLM(nn.Module):
    """One rank's shard of the model.

    Attributes:
        num_heads: query heads of a layer here.
    """

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        self.embed_tokens = VocabEmbedding(context, "embed_tokens")
        self.layers = nn.ModuleList(
            DecoderLayer(context, layer) for layer in range(context.model.num_hidden_layers)
        )
        first = self.layers[0]
        assert isinstance(first, DecoderLayer)
        self.num_heads = first.self_attn.num_heads
        self.norm = RMSNorm(context, context.model.hidden_size)
        self.lm_head = OutputHead(context, self.embed_tokens)
        self._rope = make_rope_table(context)

    def forward(
        self,
        token_ids_T: torch.Tensor,
        step: ForwardContext,
        needed: NeededRows | None = None,
    ) -> torch.Tensor:
        """Final hidden states [R, H]; a collective over the world, T and R may be 0.

        Only attention mixes rows. So nothing behind the last layer's needs the others.

        Args:
            needed: the rows that are needed, in the order wanted; None: all T of them.
        """
        assert needed is None or step.num_tokens_1 is None, "padding has no place among some rows"
        step = step.with_share(len(token_ids_T), self.embed_tokens.tp)
        x, residual = self.embed_tokens(token_ids_T), None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, self._rope, step, needed if index == last else None)
        assert residual is not None
        normed_RH, _ = self.norm.after_adding(x, residual)
        return normed_RH

    def shortened(self) -> Qwen3MoeForCausalLM:
        """The same weights with as few layers as show each kind of layer and what follows it.

        The last layer, in which few rows may be needed, is of the kind that it is in the whole
        model. So whatever is launched there is launched here, only less often.
        """
        kinds = [type(layer.mlp) for layer in self.layers]
        num_first = min(len(kinds), max(map(kinds.index, kinds)) + 2)
        part = copy.copy(self)
        part._modules = dict(self._modules)
        part.layers = self.layers[:num_first]
        if kinds[num_first - 1] is not kinds[-1]:
            part.layers.append(self.layers[-1])
        return part

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
