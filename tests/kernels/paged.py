"""Paged caches filled with random contexts, for the tests of the attention kernels.

Legend: S sequences, T tokens, N query heads, G KV heads, D head dimension, B blocks, L tokens a
block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from moe_engine.ops.paged_batch import PagedBatch
from moe_engine.ops.prefill_plan import PrefillSpan


@dataclass(frozen=True)
class Case:
    """Queries, and a cache whose entries outside the contexts are all NaN."""

    q_TND: torch.Tensor
    cache: tuple[torch.Tensor, torch.Tensor]
    batch: PagedBatch

    @property
    def scale(self) -> float:
        return self.q_TND.shape[2] ** -0.5

    @property
    def positions_T(self) -> torch.Tensor:
        """Where the step's own tokens stand in their contexts; 0 for a padding row."""
        contexts = self.batch.context_lens_S.tolist()
        nums = [num for _, num in self.batch.rows]
        positions = [
            torch.arange(num) + max(context - num, 0)
            for num, context in zip(nums, contexts, strict=True)
        ]
        return torch.cat(positions).to(self.q_TND.device)

    @property
    def own_kv_2TGD(self) -> torch.Tensor:
        """The keys and values of the step's own tokens."""
        return torch.stack([tensor.flatten(0, 1)[self.batch.slots_T] for tensor in self.cache])


def make_case(
    lens: list[tuple[int, int]],
    *,
    device: str,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
) -> Case:
    """A step of sequences with ``lens`` = (query length, context length), decodes first.

    A context of 0 is a padding row: slot -1. Blocks lie in random order; entries of the tables past
    a context name blocks that hold NaN or do not exist.
    """
    num_blocks = [-(-context // block_size) for _, context in lens]
    total_blocks = sum(num_blocks) + 2
    order = torch.randperm(total_blocks, dtype=torch.int32)
    shape = (total_blocks, block_size, num_kv_heads, head_dim)
    keys, values = torch.randn(2, *shape)
    inside_BL = torch.zeros(total_blocks, block_size, dtype=torch.bool)
    tables_SB = torch.full((len(lens), max([*num_blocks, 0]) + 1), 2**30, dtype=torch.int32)
    slots: list[torch.Tensor] = []
    first = 0
    for table, count, (query_len, context) in zip(tables_SB, num_blocks, lens, strict=True):
        table[:count] = order[first : first + count]
        first += count
        positions = torch.arange(context)
        blocks, offsets = table[positions // block_size].long(), positions % block_size
        inside_BL[blocks, offsets] = True
        new = (blocks * block_size + offsets)[context - query_len :]
        slots.append(new if context else torch.tensor([-1]))
    keys[~inside_BL], values[~inside_BL] = math.nan, math.nan
    keys, values = keys.to(cache_dtype or dtype), values.to(cache_dtype or dtype)
    query_lens = torch.tensor([query_len for query_len, _ in lens], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), query_lens.cumsum(0).int()])
    num_decodes = sum(query_len == 1 for query_len, _ in lens)
    assert all(query_len > 1 for query_len, _ in lens[num_decodes:])
    batch = PagedBatch(
        slots_T=torch.cat([*slots, torch.empty(0, dtype=torch.int64)]).to(device),
        block_tables_SB=tables_SB.to(device),
        context_lens_S=torch.tensor([c for _, c in lens], dtype=torch.int32, device=device),
        query_starts_S=starts.to(device),
        num_decodes=num_decodes,
        prefills=tuple(
            PrefillSpan(int(start), query_len, context)
            for start, (query_len, context) in zip(starts[:-1], lens, strict=True)
            if query_len > 1
        ),
    )
    q_TND = torch.randn(int(query_lens.sum()), num_heads, head_dim).to(dtype)
    return Case(q_TND.to(device), (keys.to(device), values.to(device)), batch)


def expected(case: Case) -> torch.Tensor:
    """The reference's output [T, N, D] in float32 (from the cached values as they are rounded)."""
    from moe_engine.ops.reference import attention as reference

    keys, values = (tensor.float() for tensor in case.cache)
    batch = case.batch
    spans = [(row, 1) for row in range(batch.num_decodes)]
    spans += [(span.first_row, span.query_len) for span in batch.prefills]
    return reference.paged_attention(
        case.q_TND.float(),
        keys,
        values,
        batch.block_tables_SB,
        batch.context_lens_S,
        spans,
        case.scale,
    )


def with_a_shared_prefix(case: Case) -> Case:
    """The first sequence, which decodes, begins with blocks of the last, a prompt of this step."""
    tables_SB, contexts_S = case.batch.block_tables_SB.clone(), case.batch.context_lens_S
    num_shared = int(min(contexts_S[0] - 1, contexts_S[-1])) // case.cache[0].shape[1]
    tables_SB[0, :num_shared] = tables_SB[-1, :num_shared]
    return replace(case, batch=replace(case.batch, block_tables_SB=tables_SB))


def in_the_last_blocks(case: Case) -> Case:
    """The same contexts in the last blocks of caches of more than 2^31 elements."""
    blocks_BLGD = case.cache[0]
    num_blocks = 2**31 // blocks_BLGD[0].numel() + len(blocks_BLGD)
    far = [blocks_BLGD.new_empty(num_blocks, *blocks_BLGD.shape[1:]) for _ in "kv"]
    for there, here in zip(far, case.cache, strict=True):
        there[-len(here) :] = here
    tables_SB = case.batch.block_tables_SB + num_blocks - len(blocks_BLGD)
    batch = replace(case.batch, block_tables_SB=tables_SB)
    return replace(case, cache=(far[0], far[1]), batch=batch)
