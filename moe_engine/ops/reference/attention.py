"""Causal attention over a paged KV cache in plain torch.

Shape legend: T tokens, N query heads, G KV heads, D head dimension, B blocks, L tokens a block,
C context length of one sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def write_kv(
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    k_cache_BLGD: torch.Tensor,
    v_cache_BLGD: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Store the keys and values of T tokens at ``slots_T`` (int64, block × L + offset)."""
    k_cache_BLGD.view(-1, *k_cache_BLGD.shape[2:]).index_copy_(0, slots_T, k_TGD)
    v_cache_BLGD.view(-1, *v_cache_BLGD.shape[2:]).index_copy_(0, slots_T, v_TGD)


def paged_attention(
    q_TND: torch.Tensor,
    k_cache_BLGD: torch.Tensor,
    v_cache_BLGD: torch.Tensor,
    block_tables: list[torch.Tensor],
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
) -> torch.Tensor:
    """Attend each sequence's queries to its own cached context; returns [T, N, D].

    Args:
        q_TND: queries of all sequences, one after the other.
        k_cache_BLGD, v_cache_BLGD: the cache, holding also this step's keys and values.
        block_tables: per sequence the int64 ids of its blocks, at least ceil(C / L) of them.
        query_lens: queries per sequence; they are the last positions of its context.
        context_lens: tokens in the cache per sequence, this step's included.
        scale: factor on the scores, usually D ** -0.5.

    Example: one sequence with ``query_lens = [2]`` and ``context_lens = [5]`` has queries at
    positions 3 and 4; the first attends to positions 0..3, the second to 0..4.
    """
    out_TND = torch.empty_like(q_TND)
    block_size = k_cache_BLGD.shape[1]
    first = 0
    for blocks, query_len, context_len in zip(block_tables, query_lens, context_lens, strict=True):
        last = first + query_len
        num_blocks = -(-context_len // block_size)
        used = blocks[:num_blocks]
        k_CGD = k_cache_BLGD[used].flatten(0, 1)[:context_len]
        v_CGD = v_cache_BLGD[used].flatten(0, 1)[:context_len]
        mask = None
        if query_len > 1:
            rows = torch.arange(context_len - query_len, context_len, device=q_TND.device)
            mask = rows[:, None] >= torch.arange(context_len, device=q_TND.device)[None, :]
        attended = F.scaled_dot_product_attention(
            q_TND[first:last].transpose(0, 1)[None],
            k_CGD.transpose(0, 1)[None],
            v_CGD.transpose(0, 1)[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        out_TND[first:last] = attended[0].transpose(0, 1)
        first = last
    return out_TND
