"""Exchange for one rank that holds every expert."""

from __future__ import annotations

import torch

from moe_engine.dist.exchange.base import Received


class LocalExchange:
    """Nothing moves: every expert is here."""

    shards_tokens = False
    is_capturable = True

    def dispatch(
        self, x_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Received:
        """See `Exchange.dispatch`."""
        return Received(x_TH, expert_ids_TK, weights_TK)

    def combine(self, y_RH: torch.Tensor, received: Received) -> torch.Tensor:
        """See `Exchange.combine`."""
        return y_RH
