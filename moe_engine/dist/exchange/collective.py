"""Exchange over any torch.distributed backend: all-to-all-v, the portable reference.

Shape legend: T tokens brought, R rows received, H hidden size, K experts per token, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.dist.communicator import Communicator
from moe_engine.dist.exchange.base import ExpertShard, Received
from moe_engine.dist.exchange.replicas import Balancing, physical_ids
from moe_engine.ops.moe import ExpertOutputs, summed


@dataclass(frozen=True)
class _Route:
    """How one dispatch travelled.

    Attributes:
        num_tokens: T.
        token_of_row: int64, the token behind each row sent, in sending order.
        sent, received: rows per rank.
    """

    num_tokens: int
    token_of_row: torch.Tensor
    sent: list[int]
    received: list[int]


class CollectiveExchange:
    """One copy of a token per destination rank; its expert ids and weights ride along."""

    shards_tokens = True
    is_capturable = False

    def __init__(self, shard: ExpertShard, ep: Communicator) -> None:
        self._shard = shard
        self._ep = ep

    def dispatch(
        self,
        x_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        balancing: Balancing | None = None,
    ) -> Received:
        """See `Exchange.dispatch`."""
        expert_ids_TK = physical_ids(expert_ids_TK, balancing)
        num_tokens, top_k = expert_ids_TK.shape
        rank_of_choice_TK = expert_ids_TK.to(torch.int64) // self._shard.num_local
        # A column more takes the choices that are no expert (id -1).
        goes = torch.zeros(num_tokens, self._ep.size + 1, dtype=torch.bool, device=x_TH.device)
        goes.scatter_(1, rank_of_choice_TK.remainder(self._ep.size + 1), True)
        goes_TW = goes[:, : self._ep.size]
        token_of_row = goes_TW.t().nonzero()[:, 1]
        sent, received = self._exchange_counts(goes_TW.sum(dim=0))
        row_bytes = torch.cat(
            [_as_bytes(x_TH), _as_bytes(expert_ids_TK), _as_bytes(weights_TK)], dim=1
        )
        rows = self._ep.all_to_all_rows(row_bytes[token_of_row], sent, received)
        x_width = x_TH.shape[1] * x_TH.element_size()
        id_width = top_k * expert_ids_TK.element_size()
        x_RH = _from_bytes(rows[:, :x_width], x_TH.dtype)
        ids_RK = _from_bytes(rows[:, x_width : x_width + id_width], expert_ids_TK.dtype)
        weights_RK = _from_bytes(rows[:, x_width + id_width :], weights_TK.dtype)
        route = _Route(num_tokens, token_of_row, sent, received)
        # As many come, on average, as go.
        num_pairs = max(1, min(ids_RK.numel(), expert_ids_TK.numel()))
        return Received(x_RH, self._shard.local_slots(ids_RK), weights_RK, num_pairs, route)

    def combine(self, y: torch.Tensor | ExpertOutputs, received: Received) -> torch.Tensor:
        """See `Exchange.combine`."""
        y_RH = summed(y)
        route: _Route = received.route
        rows = self._ep.all_to_all_rows(y_RH, route.received, route.sent)
        out_TH = torch.zeros(
            route.num_tokens, y_RH.shape[1], dtype=torch.float32, device=y_RH.device
        )
        out_TH.index_add_(0, route.token_of_row, rows.to(torch.float32))
        return out_TH.to(y_RH.dtype)

    def _exchange_counts(self, counts_W: torch.Tensor) -> tuple[list[int], list[int]]:
        """Tell every rank how many rows it will get; returns (sent, received) per rank."""
        ones = [1] * self._ep.size
        incoming = self._ep.all_to_all_rows(counts_W, ones, ones)
        return counts_W.tolist(), incoming.tolist()


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of every row, uint8 [rows, width × element size]."""
    return x.contiguous().view(torch.uint8)


def _from_bytes(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `_as_bytes` on a slice of columns."""
    return rows.contiguous().view(dtype)
