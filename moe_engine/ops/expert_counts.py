"""Tokens per expert.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import torch

from moe_engine.ops import native
from moe_engine.ops.reference import expert_counts as reference


def expert_token_counts(topk_ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens the router sent to each expert.

    Example: ``[[0, 2], [2, -1]]`` with 4 experts gives ``[1, 0, 2, 0]``.

    Args:
        topk_ids_TK: int32 or int64 [T, K], contiguous; ids below 0 are padding and not counted.
        num_experts: E; every id must be less. On a CPU a larger one raises; on a GPU, where
            looking would mean waiting, it is left out of the counts.

    Returns:
        counts_E: int32 [E] on the same device; nothing waits for the device.

    Raises:
        ValueError: a wrong shape, dtype or layout, or an id that is too large (CPU only).
    """
    if topk_ids_TK.dim() != 2 or topk_ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"topk_ids_TK is {topk_ids_TK.dtype} {list(topk_ids_TK.shape)}; "
            "it must be int32 or int64 [T, K]"
        )
    if not topk_ids_TK.is_contiguous():
        raise ValueError(f"topk_ids_TK has strides {topk_ids_TK.stride()}; it must be contiguous")
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; it must be at least 1")

    if topk_ids_TK.is_cuda:
        extension = native.cuda_extension(topk_ids_TK.device)
        if extension is not None:
            num_tokens, top_k = topk_ids_TK.shape
            counts_E = torch.empty(num_experts, dtype=torch.int32, device=topk_ids_TK.device)
            with torch.cuda.device(topk_ids_TK.device):
                extension.expert_token_counts(
                    topk_ids=topk_ids_TK.data_ptr(),
                    ids_are_int64=topk_ids_TK.dtype == torch.int64,
                    num_tokens=num_tokens,
                    top_k=top_k,
                    num_experts=num_experts,
                    counts=counts_E.data_ptr(),
                    stream=torch.cuda.current_stream().cuda_stream,
                )
            return counts_E
    elif topk_ids_TK.numel() and (largest := int(topk_ids_TK.max())) >= num_experts:
        raise ValueError(f"topk_ids_TK holds expert {largest}; there are {num_experts} experts")
    return reference.expert_token_counts(topk_ids_TK, num_experts)
