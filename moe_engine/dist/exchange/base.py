"""The protocol of every exchange backend.

Shape legend: T tokens that this rank brings, R rows that it receives, H hidden size, K experts
per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moe_engine.dist.exchange.replicas import Balancing
from moe_engine.ops.moe import ExpertOutputs, MoEOutput


@dataclass(frozen=True, slots=True)
class ExpertShard:
    """The contiguous experts ``[rank * num_local, (rank + 1) * num_local)`` of a rank."""

    num_experts: int
    num_ranks: int
    rank: int

    @property
    def num_local(self) -> int:
        """Experts that each rank holds."""
        return self.num_experts // self.num_ranks

    def local_slots(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """Local slot of each expert id, int32; -1 for experts of other ranks."""
        slots = expert_ids - self.rank * self.num_local
        outside = (slots < 0) | (slots >= self.num_local)
        return slots.masked_fill(outside, -1).to(torch.int32)


@dataclass(frozen=True)
class Received:
    """Rows that a rank's experts have to work on.

    Attributes:
        x_RH: one row per (token, this rank), whatever the number of the token's experts here.
        slot_ids_RK: int32 local expert slots, -1 where the token's k-th expert is elsewhere.
        weights_RK: float32.
        num_pairs: slots that hold an expert, on average; None: all.
        route: what the backend needs to send the results back; private to it.
    """

    x_RH: torch.Tensor
    slot_ids_RK: torch.Tensor
    weights_RK: torch.Tensor
    num_pairs: int | None = None
    route: Any = None


class Exchange(Protocol):
    """Moves tokens to their experts' ranks and sums what comes back.

    Attributes:
        shards_tokens: True if the ranks of an attention-TP group, which all hold the same tokens,
            must bring disjoint shares of them; False if every rank brings all of its tokens.
        is_capturable: whether a CUDA graph can hold a dispatch and a combine, since neither waits
            for the device; their shapes then follow from the number of tokens alone.
    """

    shards_tokens: bool
    is_capturable: bool

    def dispatch(
        self,
        x_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        balancing: Balancing | None = None,
    ) -> Received:
        """Send each token to the ranks of its experts; a collective over the EP group.

        Args:
            x_TH: this rank's tokens; T may be 0 and may differ between ranks.
            expert_ids_TK: int32 in [0, num_experts), or -1 for no expert.
            weights_TK: float32.
            balancing: which replicas the tokens go to, and where their choices are counted.
        """
        ...

    def combine(self, y: torch.Tensor | ExpertOutputs, received: Received) -> MoEOutput:
        """Bring back the rows that the experts made and sum them per token.

        Args:
            y: for each row of ``received`` the weighted sum over its local experts, [R, H].
            received: what `dispatch` of the same layer returned.

        Returns:
            [T, H] in ``y``'s dtype, summed over the ranks in float32. If it is `PendingRows`, they
            must be made before this rank's next exchange.
        """
        ...
