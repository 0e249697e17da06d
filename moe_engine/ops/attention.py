"""Paged attention: the batch description and the operator.

Shape legend: T tokens, S sequences, N query heads, G KV heads, D head dimension, B blocks,
L tokens a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_engine.ops.reference import attention as reference


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """A sequence that computes several positions in a step.

    Attributes:
        first_row: its first row among the T tokens of the step.
        query_len: rows of this step; they are the last positions of its context.
        context_len: tokens in the cache once this step's are written.
    """

    first_row: int
    query_len: int
    context_len: int


@dataclass(frozen=True)
class PagedBatch:
    """Where the tokens of one step stand in the paged KV cache.

    The first ``num_decodes`` of the S sequences compute one position each, in rows
    0 .. num_decodes - 1; the others are ``prefills``, whose rows follow in the same order. A CUDA
    graph runs with padding rows behind the last real decode: slot -1, context length 0.

    Attributes:
        slots_T: int64, cache slot (block × L + offset) of each token's key and value; -1: nowhere.
        block_tables_SB: int32 [S, B], each row the blocks of a sequence; what lies past its
            context is arbitrary.
        context_lens_S: int32 [S], tokens in the cache once this step's are written.
        query_starts_S: int32 [S + 1], first row of each sequence, then T.
        num_decodes: sequences that compute one position, padding rows included.
        prefills: the spans of the other sequences, known on the host.
    """

    slots_T: torch.Tensor
    block_tables_SB: torch.Tensor
    context_lens_S: torch.Tensor
    query_starts_S: torch.Tensor
    num_decodes: int
    prefills: tuple[PrefillSpan, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.num_decodes + sum(span.query_len for span in self.prefills)


def paged_attention(
    q_TND: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
) -> torch.Tensor:
    """Attend causally to the cache, which already holds this step's keys and values; [T, N, D].

    Args:
        cache: keys and values of one layer, each [B, L, G, D].
        scale: factor on the scores, usually D ** -0.5.
    """
    k_cache_BLGD, v_cache_BLGD = cache
    assert q_TND.shape[1] % k_cache_BLGD.shape[2] == 0, (q_TND.shape, k_cache_BLGD.shape)
    assert q_TND.shape[2] == k_cache_BLGD.shape[3], (q_TND.shape, k_cache_BLGD.shape)
    assert batch.num_tokens == q_TND.shape[0], (batch.num_tokens, q_TND.shape)
    spans = [(row, 1) for row in range(batch.num_decodes)]
    spans += [(span.first_row, span.query_len) for span in batch.prefills]
    return reference.paged_attention(
        q_TND,
        k_cache_BLGD,
        v_cache_BLGD,
        batch.block_tables_SB,
        batch.context_lens_S,
        spans,
        scale,
    )
