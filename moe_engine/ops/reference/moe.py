"""Router and expert feed-forward in plain torch.

Shape legend: T tokens, R received rows, H hidden size, E experts (or local slots), K experts per
token, I intermediate size of an expert.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F


def route(
    x_TH: torch.Tensor,
    router_EH: torch.Tensor,
    top_k: int,
    normalize: bool,
    num_tokens_1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the experts in float32, then the K best of every token.

    Returns ids int32 [T, K], best first, and weights float32 [T, K]; with ``normalize`` the
    weights of a token sum to 1 (``norm_topk_prob`` of the checkpoint). Rows from
    ``num_tokens_1[0]`` on are padding: ids -1, weights 0.
    """
    probabilities_TE = F.linear(x_TH, router_EH).softmax(dim=-1, dtype=torch.float32)
    weights_TK, ids_TK = probabilities_TE.topk(top_k, dim=-1)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    ids_TK = ids_TK.to(torch.int32)
    if num_tokens_1 is not None:
        padding_T1 = (torch.arange(len(x_TH), device=x_TH.device) >= num_tokens_1)[:, None]
        ids_TK = ids_TK.masked_fill(padding_T1, -1)
        weights_TK = weights_TK.masked_fill(padding_T1, 0.0)
    return ids_TK, weights_TK


def group_by_expert(
    slot_ids_RK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair numbers sorted by expert (int32 [P]) after where each begins (int32 [E + 1]).

    Example: ids [[1, 0], [-1, 1]] of 2 experts: offsets [0, 1, 3], pairs [1, 0, 3, arbitrary].
    """
    ids_P = slot_ids_RK.reshape(-1).to(torch.int64)
    elsewhere_last_P = ids_P.masked_fill(ids_P < 0, num_experts)
    pairs_P = elsewhere_last_P.argsort(stable=True).to(torch.int32)
    experts_E1 = torch.arange(num_experts + 1, device=ids_P.device)
    offsets_E1 = torch.searchsorted(elsewhere_last_P.sort().values, experts_E1).to(torch.int32)
    return offsets_E1, pairs_P


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
    offsets_E1, pairs_P = group_by_expert(slot_ids_RK, gate_up_EJH.shape[0])
    for slot, (first, last) in enumerate(pairwise(offsets_E1.tolist())):
        if first == last:
            continue
        chosen = pairs_P[first:last]
        rows = chosen // num_choices
        gate, up = F.linear(x_RH[rows], gate_up_EJH[slot]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_EHI[slot])
        weighted = y.to(torch.float32) * weights_RK.reshape(-1)[chosen, None]
        out_RH.index_add_(0, rows, weighted)
    return out_RH.to(x_RH.dtype)


def sum_choices(
    y_PH: torch.Tensor, slot_ids_RK: torch.Tensor, weights_RK: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of each row's K outputs in float32, those with an id below 0 left out; [R, H].

    Example, K = 2, H = 1: y [1, 2, 3, arbitrary], ids [[0, 1], [0, -1]], weights
    [[1, 0.5], [2, 9]]: [[2], [6]].
    """
    num_rows, num_choices = slot_ids_RK.shape
    y_RKH = y_PH.view(num_rows, num_choices, y_PH.shape[1]).to(torch.float32)
    weighted_RKH = y_RKH * weights_RK[:, :, None]
    summed_RH = weighted_RKH.masked_fill((slot_ids_RK < 0)[:, :, None], 0.0).sum(dim=1)
    return summed_RH.to(y_PH.dtype)
