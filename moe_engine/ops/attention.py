"""Paged attention: the batch description and the operator.

Shape legend: T tokens, S sequences, N query heads, G KV heads, D head dimension, B blocks,
L tokens a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.ops.reference import attention as reference


@dataclass(frozen=True)
class PagedBatch:
    """Where the tokens of one step stand in the paged KV cache.

    Attributes:
        slots_T: int64, cache slot (block × L + offset) that each token's key and value go to.
        block_tables: per sequence int64 block ids.
        query_lens: tokens of this step per sequence, summing to T.
        context_lens: tokens in the cache per sequence once this step's are written.
    """

    slots_T: torch.Tensor
    block_tables: list[torch.Tensor]
    query_lens: list[int]
    context_lens: list[int]


def paged_attention(
    q_TND: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
) -> torch.Tensor:
    """Write this step's keys and values, then attend causally; returns [T, N, D].

    The writes of the whole batch come before any read, so a sequence may share a block with
    another one that fills it in the same step.

    Args:
        cache: keys and values of one layer, each [B, L, G, D].
    """
    k_cache_BLGD, v_cache_BLGD = cache
    assert k_TGD.shape[1:] == k_cache_BLGD.shape[2:], (k_TGD.shape, k_cache_BLGD.shape)
    assert q_TND.shape[1] % k_TGD.shape[1] == 0, (q_TND.shape, k_TGD.shape)
    assert sum(batch.query_lens) == q_TND.shape[0], (batch.query_lens, q_TND.shape)
    reference.write_kv(k_TGD, v_TGD, k_cache_BLGD, v_cache_BLGD, batch.slots_T)
    return reference.paged_attention(
        q_TND,
        k_cache_BLGD,
        v_cache_BLGD,
        batch.block_tables,
        batch.query_lens,
        batch.context_lens,
        scale,
    )
