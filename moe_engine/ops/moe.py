"""Router and expert feed-forward operators.

Shape legend: T tokens, R rows, H hidden size, E local expert slots, K experts per token,
I intermediate size, J = 2 × I.
"""

from __future__ import annotations

import torch

from moe_engine.ops.reference import moe as reference


def route(
    router_logits_TE: torch.Tensor, num_experts_per_tok: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K experts of every token: ids int32 [T, K] and weights float32 [T, K]."""
    assert router_logits_TE.shape[1] >= num_experts_per_tok, router_logits_TE.shape
    return reference.route(router_logits_TE, num_experts_per_tok, normalize)


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
