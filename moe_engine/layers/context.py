"""What layers are built with, and what they are run with.

Shape legend: T tokens, F half of the head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.cache.kv import KVCache
from moe_engine.config import ModelConfig
from moe_engine.dist.exchange import Exchange
from moe_engine.dist.groups import ParallelGroups
from moe_engine.ops.attention import PagedBatch


@dataclass(frozen=True)
class LayerContext:
    """Everything a layer needs to size and place its own shard of the weights."""

    model: ModelConfig
    groups: ParallelGroups
    dtype: torch.dtype
    device: torch.device

    def parameter(self, *shape: int) -> torch.nn.Parameter:
        """An uninitialised weight of this context's dtype and device."""
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return torch.nn.Parameter(empty, requires_grad=False)


@dataclass(frozen=True)
class ForwardContext:
    """One step of one rank, as the layers see it.

    Attributes:
        positions_T: int64 position of each token in its sequence.
        batch: where the tokens stand in the KV cache.
        kv: the KV cache of this rank.
        exchange: the MoE exchange backend of this step.
        tp_token_counts: how the T tokens are shared out over the attention-TP group when the
            exchange wants disjoint shares.
    """

    positions_T: torch.Tensor
    batch: PagedBatch
    kv: KVCache
    exchange: Exchange
    tp_token_counts: list[int]


@dataclass(frozen=True)
class RopeTable:
    """cos and sin of the step's positions, each [T, F]."""

    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
