"""What layers are built with, and what they are run with.

Shape legend: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moe_engine.cache.kv import KVCache
from moe_engine.config import ModelConfig
from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange import Exchange
from moe_engine.dist.groups import ParallelGroups
from moe_engine.dist.layout import split_evenly
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
        share_tokens_1: the same of this rank's share of the rows (`with_share`), below 1 if it is
            all padding.
    """

    positions_T: torch.Tensor
    batch: PagedBatch
    kv: KVCache
    exchange: Exchange
    num_tokens_1: torch.Tensor | None = None
    share_tokens_1: torch.Tensor | None = None

    def with_share(self, num_rows: int, tp: Communicator) -> ForwardContext:
        """For layers whose rows the ranks of a TP group share out: what they know of their share.

        Once for all layers, as it takes a launch.
        """
        if self.num_tokens_1 is None or tp.size == 1 or not self.exchange.shards_tokens:
            return self
        first, _ = share_of_rows(num_rows, tp)
        return replace(self, share_tokens_1=self.num_tokens_1 - first)


def share_of_rows(num_rows: int, tp: Communicator) -> tuple[int, list[int]]:
    """The first row of this rank's share, and the sizes of all shares."""
    counts = split_evenly(num_rows, tp.size)
    return sum(counts[: tp.rank]), counts
