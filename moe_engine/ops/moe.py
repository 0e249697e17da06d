"""Router and expert feed-forward operators.

Shape legend: T tokens, R rows, H hidden size, E experts or local expert slots, K experts per token,
P = R × K pairs of a row and one of its experts, I intermediate size, J = 2 × I.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.ops.reference import moe as reference


@dataclass(frozen=True)
class ExpertGroups:
    """Pairs (row, choice), numbered row × K + choice, sorted by expert.

    Attributes:
        offsets_E1: int32 [E + 1], where each expert's pairs begin, then how many there are.
        pairs_P: int32 [P], pair numbers in increasing order within an expert; what lies past the
            last offset is arbitrary.
    """

    offsets_E1: torch.Tensor
    pairs_P: torch.Tensor


def route(
    x_TH: torch.Tensor,
    router_EH: torch.Tensor,
    top_k: int,
    normalize: bool,
    num_tokens_1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K experts of every token: ids int32 [T, K], best first, and weights float32 [T, K].

    Args:
        router_EH: the gate's weight.
        normalize: whether the weights of a token are scaled to sum to 1.
        num_tokens_1: int32 [1] on the device; the rows from there on are padding, with ids -1 and
            weights 0. None: there is no padding.
    """
    assert x_TH.shape[1] == router_EH.shape[1], (x_TH.shape, router_EH.shape)
    assert 1 <= top_k <= router_EH.shape[0], (top_k, router_EH.shape)
    return reference.route(x_TH, router_EH, top_k, normalize, num_tokens_1)


def group_by_expert(slot_ids_RK: torch.Tensor, num_experts: int) -> ExpertGroups:
    """Sort the pairs by expert slot, leaving out ids below 0; nothing waits for the device."""
    return ExpertGroups(*reference.group_by_expert(slot_ids_RK, num_experts))


def expert_ffn(
    x_RH: torch.Tensor,
    slot_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of each row's local experts; see `ops.reference.moe.expert_ffn`."""
    num_slots, doubled, hidden = gate_up_EJH.shape
    assert x_RH.shape[1] == hidden, (x_RH.shape, gate_up_EJH.shape)
    assert down_EHI.shape == (num_slots, hidden, doubled // 2), down_EHI.shape
    assert slot_ids_RK.shape == weights_RK.shape, (slot_ids_RK.shape, weights_RK.shape)
    return reference.expert_ffn(x_RH, slot_ids_RK, weights_RK, gate_up_EJH, down_EHI)
