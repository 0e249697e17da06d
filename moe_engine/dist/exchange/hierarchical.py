"""Exchange over several NVLink domains: a token crosses to another domain once.

Ranks of the same number in their domains exchange first, over what joins the domains: for each of
the others a token goes to one rank there, its gateway, if that domain has an expert of it. The
gateways then exchange what they hold within the domain, as they do their own tokens. On the way
back a domain's sum crosses, one row for each (token, domain).

    domain 0: ranks 0, 1         domain 1: ranks 2, 3          ranks 0 and 2 exchange, 1 and 3
    token of rank 0, for ranks 1, 2 and 3: it goes to rank 2, once; from 0 to 1; from 2 to 2 and 3

Shape legend: T tokens that this rank brings, K experts per token, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_engine.dist.exchange.base import Exchange, Received
from moe_engine.dist.exchange.replicas import Balancing
from moe_engine.ops.moe import ExpertOutputs, summed


class HierarchicalExchange:
    """Two exchanges, one behind the other.

    Domains are of as many ranks each, with consecutive numbers.

    Args:
        across: among the ranks of this one's number in all domains, as if each held all experts of
            its domain.
        inside: among the ranks of this domain, with the experts of this domain alone, for what all
            domains' ranks of a number may bring together.
    """

    shards_tokens = True

    def __init__(self, across: Exchange, inside: Exchange) -> None:
        assert across.shards_tokens, across
        assert inside.shards_tokens, inside
        self._across = across
        self._inside = inside
        self.is_capturable = across.is_capturable and inside.is_capturable

    def dispatch(
        self,
        x_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        balancing: Balancing | None = None,
    ) -> Received:
        """See `Exchange.dispatch`."""
        arrived = self._across.dispatch(x_TH, expert_ids_TK, weights_TK, balancing)
        received = self._inside.dispatch(arrived.x_RH, arrived.slot_ids_RK, arrived.weights_RK)
        # As many pairs as all ranks bring, on average, are here, not as many as they might.
        return replace(received, num_pairs=arrived.num_pairs, route=(arrived, received))

    def combine(self, y: torch.Tensor | ExpertOutputs, received: Received) -> torch.Tensor:
        """See `Exchange.combine`; summed over a domain's ranks, rounded, then over the domains."""
        arrived, inside = received.route
        of_domain = summed(self._inside.combine(y, inside))
        return summed(self._across.combine(of_domain, arrived))
