"""Exchange for one rank that holds every expert."""

from __future__ import annotations

import torch

from moe_engine.dist.exchange.base import Received
from moe_engine.dist.exchange.replicas import Balancing, physical_ids
from moe_engine.ops.moe import ExpertOutputs


class LocalExchange:
    """Nothing moves: every expert is here."""

    shards_tokens = False
    is_capturable = True

    def dispatch(
        self,
        x_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        balancing: Balancing | None = None,
    ) -> Received:
        """See `Exchange.dispatch`."""
        return Received(x_TH, physical_ids(expert_ids_TK, balancing), weights_TK)

    def combine(
        self, y: torch.Tensor | ExpertOutputs, received: Received
    ) -> torch.Tensor | ExpertOutputs:
        """See `Exchange.combine`."""
        return y
