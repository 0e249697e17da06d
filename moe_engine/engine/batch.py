"""From a group's steps to the tensors of a step of any kind.

A step that only decodes runs as a CUDA graph instead, where there is one (see `engine.decode`).

Shape legend: T tokens of the step, S sequences, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_engine.engine.staging import stage
from moe_engine.engine.table import SequenceTable
from moe_engine.ops.attention import PagedBatch, PrefillSpan
from moe_engine.types.step import GroupPlan, SequenceStep


@dataclass(frozen=True)
class StepBatch:
    """The tensors of one step.

    Attributes:
        token_ids_T, positions_T: int64.
        paged: where the tokens stand in the KV cache; sequences that compute one position first.
        last_rows: per sequence step, in the plan's order, the row of its last token.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    paged: PagedBatch
    last_rows: list[int]


def build_batch(table: SequenceTable, steps: list[SequenceStep], slots: list[int]) -> StepBatch:
    """Lay out the step's tokens, one sequence after the other; nobody waits for the device.

    Args:
        slots: what `SequenceTable.advance` returned for ``steps``.
    """
    slots_S = np.array(slots, dtype=np.int32)
    starts_S = np.array([step.start for step in steps], dtype=np.int32)
    counts_S = np.array([step.num_tokens for step in steps], dtype=np.int32)
    order = np.argsort(counts_S > 1, kind="stable")
    last_rows = np.empty_like(order)
    last_rows[order] = counts_S[order].cumsum() - 1
    slots_S, starts_S, counts_S = slots_S[order], starts_S[order], counts_S[order]

    first_rows = np.concatenate(([0], counts_S.cumsum()))
    num_tokens = int(first_rows[-1])
    positions_T = np.arange(num_tokens) + np.repeat(starts_S - first_rows[:-1], counts_S)
    contexts_S = starts_S + counts_S
    where, positions, slots_of_rows, contexts, query_starts = stage(
        [np.repeat(slots_S, counts_S), positions_T, slots_S, contexts_S, first_rows],
        table.tokens_NC.device,
    )
    where_T, positions_T64 = where.to(torch.int64), positions.to(torch.int64)
    block_size = table.block_size
    blocks_T = table.blocks_NB[where_T, positions_T64 // block_size].to(torch.int64)
    num_blocks = -(-int(contexts_S.max(initial=1)) // block_size)
    num_decodes = int((counts_S == 1).sum())
    spans = list(zip(first_rows.tolist(), counts_S.tolist(), contexts_S.tolist(), strict=False))
    paged = PagedBatch(
        slots_T=blocks_T * block_size + positions_T64 % block_size,
        block_tables_SB=table.blocks_NB[:, :num_blocks].index_select(0, slots_of_rows),
        context_lens_S=contexts,
        query_starts_S=query_starts,
        num_decodes=num_decodes,
        prefills=tuple(PrefillSpan(*span) for span in spans[num_decodes:]),
    )
    token_ids_T = table.tokens_NC[where_T, positions_T64].to(torch.int64)
    return StepBatch(token_ids_T, positions_T64, paged, last_rows.tolist())


def largest_group(groups: list[GroupPlan]) -> int:
    """Most tokens that any DP group computes in a step."""
    return max(group.num_tokens for group in groups)
