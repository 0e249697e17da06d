"""Exchange for pure TP: all ranks hold all tokens, so only the sum has to travel."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange.base import ExpertShard, Received
from moe_engine.dist.exchange.replicas import Balancing, physical_ids
from moe_engine.ops.moe import ExpertOutputs, summed


class ReplicatedExchange:
    """Every rank runs its own experts on all tokens; one all-reduce adds the results."""

    shards_tokens = False
    is_capturable = True

    def __init__(self, shard: ExpertShard, group: Communicator) -> None:
        self._shard = shard
        self._group = group

    def dispatch(
        self,
        x_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        balancing: Balancing | None = None,
    ) -> Received:
        """See `Exchange.dispatch`; the same tokens on every rank, which the first one counts."""
        if balancing is not None and self._shard.rank > 0:
            balancing = replace(balancing, load_2E=None)
        expert_ids_TK = physical_ids(expert_ids_TK, balancing)
        num_pairs = -(-expert_ids_TK.numel() // self._shard.num_ranks)
        return Received(x_TH, self._shard.local_slots(expert_ids_TK), weights_TK, num_pairs)

    def combine(self, y: torch.Tensor | ExpertOutputs, received: Received) -> torch.Tensor:
        """See `Exchange.combine`."""
        return self._group.all_reduce_rows(summed(y))
