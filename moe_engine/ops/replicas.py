"""Which replica of an expert a token goes to: by a hash of its sequence and the expert.

Shape legend: T tokens, K experts per token, E experts, R replicas of an expert, at most.
"""

from __future__ import annotations

import torch

LAST_HASH = 0x7FFFFFFF
_WORD = 0xFFFFFFFF


def replica_hash(sequences: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to `LAST_HASH`, int64, the same on every machine.

    Source of the mixing: Chris Wellons, "Prospecting for Hash Functions" (2018), lowbias32.

    Args:
        sequences, experts: of up to 32 bits, of shapes that go together.

    Example: of sequence 0 and expert 0 it is 0.
    """
    x = _times(sequences, 0x9E3779B1) ^ _times(experts, 0x85EBCA6B)
    x = _times(x ^ x >> 16, 0x7FEB352D)
    x = _times(x ^ x >> 15, 0x846CA68B)
    return (x ^ x >> 16) & LAST_HASH


def choose_replicas(
    expert_ids_TK: torch.Tensor,
    tags_T: torch.Tensor,
    slots_ER: torch.Tensor,
    bounds_ER: torch.Tensor,
) -> torch.Tensor:
    """The physical expert of each choice, int32 [T, K]; -1 where there is no expert.

    Args:
        tags_T: int32, twice the number of a token's sequence, plus 1 in prefill.
        slots_ER, bounds_ER: int32; see `dist.exchange.replicas.ReplicaTable`.

    Example, R = 2: an expert with slots [0, 5] and bounds [9, LAST_HASH] is at 0 for the sequences
    whose hash is up to 9, and at 5 for all others.
    """
    experts_TK = expert_ids_TK.clamp(min=0).long()
    sequences_T1 = (tags_T.long() & _WORD)[:, None] >> 1
    hashes_TK1 = replica_hash(sequences_T1, experts_TK)[..., None]
    replica_TK1 = (hashes_TK1 > bounds_ER[experts_TK]).sum(dim=2, keepdim=True)
    slots_TK = slots_ER[experts_TK].gather(2, replica_TK1).squeeze(2)
    return torch.where(expert_ids_TK >= 0, slots_TK, -1)


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """The low 32 bits of a product of two numbers of 32 bits."""
    x = x.long() & _WORD
    high = (x >> 16) * factor & 0xFFFF
    return (high << 16) + (x & 0xFFFF) * factor & _WORD
