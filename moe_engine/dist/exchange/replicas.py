"""What load balancing asks of a dispatch: which replica of an expert a token goes to, and counts.

Shape legend: T tokens, K experts per token, E experts, R replicas of an expert, at most, P physical
experts, those of all ranks, one rank's after the other's, each replica by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_engine.ops.replicas import LAST_HASH, choose_replicas

DECODE, PREFILL = range(2)
"""Phases, as tags and counts number them."""
MOST_BYTES = 48 << 10
"""Of a table: blocks of the exchange's kernels hold it in their shared memory."""


@dataclass(frozen=True)
class ReplicaTable:
    """Where a layer's experts are, in memory whose address stays the same.

    A sequence's tokens go to the same replica of an expert until the table changes. It may change
    between steps.

    Attributes:
        slots_ER: int32, physical experts.
        bounds_ER: int32, ascending; a replica takes the hashes up to its bound and above that of
            the one before it; the last is `LAST_HASH`.
    """

    slots_ER: torch.Tensor
    bounds_ER: torch.Tensor

    def __post_init__(self) -> None:
        """`ValueError` where the kernels cannot hold it."""
        num_bytes = 4 * (self.slots_ER.numel() + self.bounds_ER.numel())
        if num_bytes > MOST_BYTES:
            raise ValueError(
                f"{tuple(self.slots_ER.shape)} replicas take {num_bytes} bytes, of {MOST_BYTES}"
            )

    @classmethod
    def make(
        cls,
        replicas: Sequence[Sequence[tuple[int, float]]],
        num_replicas: int,
        device: torch.device,
    ) -> ReplicaTable:
        """Of each expert, its physical ones and the shares of its tokens that they take.

        Example, R = 2: ``[[(0, 0.5), (5, 0.5)], [(1, 1.0)]]`` gives slots [[0, 5], [1, 1]] and
        bounds [[2^30 - 1, 2^31 - 1], [2^31 - 1, 2^31 - 1]].

        Args:
            num_replicas: R.
        """
        slots, bounds = [], []
        for expert, of_expert in enumerate(replicas):
            if not 1 <= len(of_expert) <= num_replicas:
                raise ValueError(
                    f"expert {expert} has {len(of_expert)} replicas; it is from 1 to {num_replicas}"
                )
            total = sum(share for _, share in of_expert)
            if not total > 0 or any(share < 0 for _, share in of_expert):
                raise ValueError(f"expert {expert}'s shares are {[s for _, s in of_expert]}")
            missing = num_replicas - len(of_expert)
            slots.append([slot for slot, _ in of_expert] + [of_expert[-1][0]] * missing)
            taken, of_hashes = 0.0, []
            for _, share in of_expert[:-1]:
                taken += share
                of_hashes.append(round(taken / total * (LAST_HASH + 1)) - 1)
            bounds.append(of_hashes + [LAST_HASH] * (missing + 1))
        as_tensor = [
            torch.tensor(rows, dtype=torch.int32, device=device) for rows in (slots, bounds)
        ]
        return cls(*as_tensor)


@dataclass(frozen=True)
class Balancing:
    """Of one layer in one step.

    Attributes:
        tags_T: int32, twice the number of a token's sequence, plus its phase.
        replicas: None: experts have no replicas, and their numbers are those of physical ones.
        load_2E: int32, to which each choice of an expert is added by phase; None: not counted.
    """

    tags_T: torch.Tensor
    replicas: ReplicaTable | None = None
    load_2E: torch.Tensor | None = None

    def apply(self, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        """Count the choices, and return them as physical experts; -1 stays as it is."""
        if self.load_2E is not None:
            phases_T1 = (self.tags_T & 1)[:, None]
            places_TK = phases_T1 * self.load_2E.shape[1] + expert_ids_TK.clamp(min=0)
            ones_TK = (expert_ids_TK >= 0).to(self.load_2E.dtype)
            self.load_2E.view(-1).index_add_(0, places_TK.flatten(), ones_TK.flatten())
        if self.replicas is None:
            return expert_ids_TK
        table = self.replicas
        return choose_replicas(expert_ids_TK, self.tags_T, table.slots_ER, table.bounds_ER)


def physical_ids(expert_ids_TK: torch.Tensor, balancing: Balancing | None) -> torch.Tensor:
    """Choices as physical experts, counted; as they are without load balancing."""
    return expert_ids_TK if balancing is None else balancing.apply(expert_ids_TK)
