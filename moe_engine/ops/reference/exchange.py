"""What an exchange moves and adds up, for all ranks at once: the bits that the kernels must give.

Shape legend: N ranks, T tokens of a rank, m tokens that a rank may bring in a step, R = N * m
slots, H hidden size, E experts of all ranks, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """What a rank brings.

    Attributes:
        ids_TK: int32, below 0 for no expert.
        weights_TK: float32.
    """

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


@dataclass(frozen=True)
class Arrivals:
    """What a rank receives: slot s * m + t holds token t of rank s.

    Attributes:
        x_RH: zeros where no expert of the rank is wanted.
        slots_RK: int32 local experts, -1 where the choice is another rank's or there is no token.
        weights_RK: float32, 0 where the slot is -1.
    """

    x_RH: torch.Tensor
    slots_RK: torch.Tensor
    weights_RK: torch.Tensor


FP8_GROUP = 128
"""Elements that share a scale."""


def through_fp8(x_TH: torch.Tensor) -> torch.Tensor:
    """What is left of rows that travel in 8 bits: e4m3 by groups, times the group's scale.

    The scale makes a group's largest element 448, e4m3's largest, or one of 1e-30 if all are below.
    Example: of 448 and 3.3, whose scale is 1, 448 and 3.25 are left.
    """
    x_TGE = x_TH.float().unflatten(1, (-1, FP8_GROUP))
    largest_TG1 = x_TGE.abs().amax(dim=2, keepdim=True).clamp(min=1e-30)
    e4m3_TG1 = torch.full_like(largest_TG1, 448)
    scales_TG1 = largest_TG1 / e4m3_TG1  # PyTorch would multiply by the reciprocal of a number
    rounded_TGE = (x_TGE * (e4m3_TG1 / largest_TG1)).to(torch.float8_e4m3fn).float()
    return (rounded_TGE * scales_TG1).flatten(1).to(x_TH.dtype)


def dispatch(
    ranks: Sequence[Tokens], num_experts: int, step_tokens: int, *, fp8: bool = False
) -> list[Arrivals]:
    """What every rank receives of what all bring.

    Args:
        fp8: rows travel as in `through_fp8`.

    Example, 2 ranks with 2 experts each, one token of rank 1 for experts 0 and 3, step_tokens 1:
    slots are [[-1, -1], [0, -1]] at rank 0 and [[-1, -1], [-1, 1]] at rank 1.
    """
    num_local = num_experts // len(ranks)
    arrivals = []
    for rank in range(len(ranks)):
        parts = []
        for tokens in ranks:
            x_TH = through_fp8(tokens.x_TH) if fp8 else tokens.x_TH
            padding = (0, 0, 0, step_tokens - len(x_TH))
            local_TK = tokens.ids_TK - rank * num_local
            is_here_TK = (tokens.ids_TK >= 0) & (local_TK >= 0) & (local_TK < num_local)
            comes_T1 = is_here_TK.any(dim=1, keepdim=True)
            pad = torch.nn.functional.pad
            parts.append(
                (
                    pad(torch.where(comes_T1, x_TH, 0), padding),
                    pad(torch.where(is_here_TK, local_TK, -1), padding, value=-1),
                    pad(torch.where(is_here_TK, tokens.weights_TK, 0), padding),
                )
            )
        arrivals.append(Arrivals(*(torch.cat(column) for column in zip(*parts, strict=True))))
    return arrivals


def presum(y_PH: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
    """A rank's sums [R, H] of its experts' outputs [R * K, H], in float32 by order of choice."""
    num_slots, top_k = arrivals.slots_RK.shape
    y_RKH = y_PH.view(num_slots, top_k, -1).float()
    sum_RH = torch.zeros_like(y_RKH[:, 0])
    for choice in range(top_k):
        is_here_R1 = arrivals.slots_RK[:, choice, None] >= 0
        part_RH = y_RKH[:, choice] * arrivals.weights_RK[:, choice, None]
        sum_RH = torch.where(is_here_R1, sum_RH + part_RH, sum_RH)
    return sum_RH.to(y_PH.dtype)


def combine(
    sums: Sequence[torch.Tensor], ranks: Sequence[Tokens], num_experts: int, step_tokens: int
) -> list[torch.Tensor]:
    """Every rank's outputs [T, H], of every rank's sums [R, H]: in float32 by order of the ranks.

    Example: sums of 1 at rank 0 and 2 at rank 1 for a token with experts at both give 3.
    """
    num_local = num_experts // len(ranks)
    outputs = []
    for home, tokens in enumerate(ranks):
        num_tokens = len(tokens.x_TH)
        total_TH = torch.zeros_like(tokens.x_TH, dtype=torch.float32)
        for rank, sum_RH in enumerate(sums):
            first = home * step_tokens
            part_TH = sum_RH[first : first + num_tokens].float()
            is_here_TK = (tokens.ids_TK >= 0) & (tokens.ids_TK // num_local == rank)
            comes_T1 = is_here_TK.any(dim=1, keepdim=True)
            total_TH = torch.where(comes_T1, total_TH + part_TH, total_TH)
        outputs.append(total_TH.to(tokens.x_TH.dtype))
    return outputs
