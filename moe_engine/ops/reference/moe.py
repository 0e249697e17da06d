"""Router and expert feed-forward in plain torch.

Shape legend: T tokens, R received rows, H hidden size, E experts (or local slots), K experts per
token, I intermediate size of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def route(
    router_logits_TE: torch.Tensor, num_experts_per_tok: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the experts in float32, then the K best of every token.

    Returns ids int32 [T, K], best first, and weights float32 [T, K]; with ``normalize`` the
    weights of a token sum to 1 (``norm_topk_prob`` of the checkpoint).
    """
    probabilities_TE = router_logits_TE.softmax(dim=-1, dtype=torch.float32)
    weights_TK, ids_TK = probabilities_TE.topk(num_experts_per_tok, dim=-1)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK.to(torch.int32), weights_TK


def expert_ffn(
    x_RH: torch.Tensor,
    slot_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of each row's local experts, float32 accumulation, [R, H] in ``x``'s dtype.

    Args:
        x_RH: rows.
        slot_ids_RK: integer local expert slots, -1 where a row has no expert here.
        weights_RK: float32 weight of each of them.
        gate_up_EJH: [E, 2 × I, H], gate rows first.
        down_EHI: [E, H, I].

    A row r gets ``sum_k w[r, k] * down[e] @ (silu(gate[e] @ x) * (up[e] @ x))``, e = ids[r, k].

    Example: one expert with I = H = 1, gate = up = down = [[1]], x = [[1]], w = [[2]]:
    silu(1) = 0.7311, times up 1, times down 1, times 2 = 1.4621.
    """
    num_rows, num_choices = slot_ids_RK.shape
    out_RH = torch.zeros(num_rows, x_RH.shape[1], dtype=torch.float32, device=x_RH.device)
    flat_ids = slot_ids_RK.reshape(-1).to(torch.int64)
    order = flat_ids.argsort(stable=True)
    counts = torch.bincount(flat_ids + 1, minlength=gate_up_EJH.shape[0] + 1).tolist()
    first = counts[0]
    for slot, count in enumerate(counts[1:]):
        if count == 0:
            continue
        chosen = order[first : first + count]
        rows = chosen // num_choices
        gate, up = F.linear(x_RH[rows], gate_up_EJH[slot]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_EHI[slot])
        weighted = y.to(torch.float32) * weights_RK.reshape(-1)[chosen, None]
        out_RH.index_add_(0, rows, weighted)
        first += count
    return out_RH.to(x_RH.dtype)
