"""Tokens per expert in PyTorch.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import torch


def expert_token_counts(topk_ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """See `moe_engine.ops.expert_counts.expert_token_counts`; never waits for a GPU."""
    ids = topk_ids_TK.reshape(-1).long()
    # Padding is counted in a bin of its own, behind the experts, that is cut off at the end.
    bins = torch.where(ids < 0, num_experts, ids)
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, bins, torch.ones_like(bins, dtype=torch.int32))
    return counts[:num_experts]
