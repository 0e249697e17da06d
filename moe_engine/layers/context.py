"""What layers are built with, and what they are run with.

Shape legend: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.cache.kv import KVCache
from moe_engine.config import ModelConfig
from moe_engine.dist.exchange import Exchange
from moe_engine.dist.groups import ParallelGroups
from moe_engine.ops.paged_batch import PagedBatch


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
        num_tokens_1: int32 [1] on the device, how many of the T rows are tokens; the others, at
            the end, are padding, which no expert works on. None: all of them are tokens.
    """

    positions_T: torch.Tensor
    batch: PagedBatch
    kv: KVCache
    exchange: Exchange
    num_tokens_1: torch.Tensor | None = None
