"""Causal attention over a paged KV cache in plain torch; it waits for the device.

Shape legend: T tokens, S sequences, N query heads, G KV heads, D head dimension, B blocks,
L tokens a block, C context length of one sequence.
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
    """Store the keys and values of T tokens at ``slots_T`` (int64, block × L + offset; -1: not)."""
    rows = (slots_T >= 0).nonzero().squeeze(1)
    slots = slots_T[rows]
    k_cache_BLGD.view(-1, *k_cache_BLGD.shape[2:]).index_copy_(0, slots, k_TGD[rows])
    v_cache_BLGD.view(-1, *v_cache_BLGD.shape[2:]).index_copy_(0, slots, v_TGD[rows])


def paged_attention(
    q_TND: torch.Tensor,
    k_cache_BLGD: torch.Tensor,
    v_cache_BLGD: torch.Tensor,
    block_tables_SB: torch.Tensor,
    context_lens_S: torch.Tensor,
    spans: list[tuple[int, int]],
    scale: float,
) -> torch.Tensor:
    """Attend each sequence's queries to its own cached context; returns [T, N, D].

    Args:
        q_TND: queries of all sequences.
        k_cache_BLGD, v_cache_BLGD: the cache, holding also this step's keys and values; of any
            floating dtype.
        block_tables_SB: int32, the blocks of each sequence, at least ceil(C / L) of them.
        context_lens_S: int32, tokens in the cache per sequence; with 0 its outputs are 0.
        spans: per sequence its first row and its number of rows, which are the last positions of
            its context.
        scale: factor on the scores, usually D ** -0.5.

    Example: one sequence with 2 queries and a context of 5 has queries at positions 3 and 4; the
    first attends to positions 0..3, the second to 0..4.
    """
    out_TND = torch.zeros_like(q_TND)
    block_size = k_cache_BLGD.shape[1]
    for blocks, context_len, (first, query_len) in zip(
        block_tables_SB, context_lens_S.tolist(), spans, strict=True
    ):
        if context_len == 0:
            continue
        rows = slice(first, first + query_len)
        used = blocks[: -(-context_len // block_size)]
        k_CGD = k_cache_BLGD[used].flatten(0, 1)[:context_len].to(q_TND.dtype)
        v_CGD = v_cache_BLGD[used].flatten(0, 1)[:context_len].to(q_TND.dtype)
        mask = None
        if query_len > 1:
            positions = torch.arange(context_len, device=q_TND.device)
            mask = positions[context_len - query_len :, None] >= positions[None, :]
        attended = F.scaled_dot_product_attention(
            q_TND[rows].transpose(0, 1)[None],
            k_CGD.transpose(0, 1)[None],
            v_CGD.transpose(0, 1)[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        out_TND[rows] = attended[0].transpose(0, 1)
    return out_TND
