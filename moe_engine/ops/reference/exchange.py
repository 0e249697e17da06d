"""Dispatch and combine among ranks that are plain lists in one process.

What every exchange backend and kernel is judged by: no communication, only its meaning.
Shape legend: T tokens of one rank, R rows received by one rank, H hidden size, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ReceivedRows:
    """What one rank receives: rows ordered by source rank, then by token.

    Attributes:
        x_RH: the tokens, once each however many of their experts live here.
        slot_ids_RK: int32 local expert slots, -1 for experts of other ranks.
        weights_RK: float32.
        sources: (source rank, token index there) of every row.
    """

    x_RH: torch.Tensor
    slot_ids_RK: torch.Tensor
    weights_RK: torch.Tensor
    sources: list[tuple[int, int]]


def dispatch(
    x: list[torch.Tensor],
    expert_ids: list[torch.Tensor],
    weights: list[torch.Tensor],
    num_experts: int,
) -> list[ReceivedRows]:
    """Send each token to every rank that holds at least one of its experts.

    Args:
        x: per rank [T, H]; T may differ and may be 0.
        expert_ids: per rank integer [T, K] in [0, num_experts), or -1 for no expert.
        weights: per rank float32 [T, K].
        num_experts: rank r of W holds experts ``[r * num_experts / W, (r + 1) * num_experts / W)``.

    Example: 2 ranks, 4 experts; a token of rank 0 with experts (1, 3) goes to rank 0 with slots
    (1, -1) and to rank 1 with slots (-1, 1).
    """
    num_ranks = len(x)
    num_local = num_experts // num_ranks
    received = []
    for rank in range(num_ranks):
        first = rank * num_local
        rows: list[tuple[int, int]] = [
            (source, token)
            for source in range(num_ranks)
            for token, ids in enumerate(expert_ids[source].tolist())
            if any(first <= expert < first + num_local for expert in ids)
        ]
        slots = _pick(expert_ids, rows) - first
        slots = slots.masked_fill((slots < 0) | (slots >= num_local), -1).to(torch.int32)
        received.append(ReceivedRows(_pick(x, rows), slots, _pick(weights, rows), rows))
    return received


def combine(
    y: list[torch.Tensor], received: list[ReceivedRows], num_tokens: list[int]
) -> list[torch.Tensor]:
    """Sum over the ranks, in float32, what their experts made of each token.

    Args:
        y: per rank [R, H], one row per row of ``received``.
        received: what `dispatch` returned.
        num_tokens: T of every rank.

    Returns:
        Per rank [T, H] in ``y``'s dtype.
    """
    width, dtype = y[0].shape[1], y[0].dtype
    out = [torch.zeros(count, width, dtype=torch.float32) for count in num_tokens]
    for y_RH, rows in zip(y, received, strict=True):
        for row, (source, token) in enumerate(rows.sources):
            out[source][token] += y_RH[row].to(torch.float32)
    return [out_TH.to(dtype) for out_TH in out]


def _pick(by_rank: list[torch.Tensor], rows: list[tuple[int, int]]) -> torch.Tensor:
    """Rows of several ranks' tensors, [len(rows), width]."""
    if not rows:
        return by_rank[0][:0]
    return torch.stack([by_rank[source][token] for source, token in rows])
