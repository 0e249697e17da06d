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
    slots_S = np.array(slots, dtype=np.int64)
    starts_S = np.array([step.start for step in steps], dtype=np.int64)
    counts_S = np.array([step.num_tokens for step in steps], dtype=np.int64)
    order = np.argsort(counts_S > 1, kind="stable")
    slots_S, starts_S, counts_S = slots_S[order], starts_S[order], counts_S[order]
    contexts_S = starts_S + counts_S
    ends_S = counts_S.cumsum()
    firsts_S = ends_S - counts_S
    last_rows = np.empty_like(order)
    last_rows[order] = ends_S - 1

    num_tokens = int(counts_S.sum())
    positions_T = np.arange(num_tokens) + np.repeat(starts_S - firsts_S, counts_S)
    slots_T = np.repeat(slots_S, counts_S)
    tokens_NC, blocks_NB, block_size = table.tokens_NC, table.blocks_NB, table.block_size
    positions, token_places, block_places, offsets, slots_of_rows, contexts, query_starts = stage(
        [
            positions_T,
            slots_T * tokens_NC.shape[1] + positions_T,
            slots_T * blocks_NB.shape[1] + positions_T // block_size,
            positions_T % block_size,
            slots_S,
            contexts_S,
            np.append(firsts_S, num_tokens),
        ],
        tokens_NC.device,
        torch.int64,
    )
    blocks_T = blocks_NB.view(-1).index_select(0, block_places).to(torch.int64)
    num_blocks = -(-int(contexts_S.max(initial=1)) // block_size)
    num_decodes = int((counts_S == 1).sum())
    spans = zip(
        firsts_S[num_decodes:].tolist(),
        counts_S[num_decodes:].tolist(),
        contexts_S[num_decodes:].tolist(),
        strict=True,
    )
    paged = PagedBatch(
        slots_T=torch.add(offsets, blocks_T, alpha=block_size),
        block_tables_SB=blocks_NB[:, :num_blocks].index_select(0, slots_of_rows),
        context_lens_S=contexts.to(torch.int32),
        query_starts_S=query_starts.to(torch.int32),
        num_decodes=num_decodes,
        prefills=tuple(PrefillSpan(*span) for span in spans),
    )
    token_ids_T = tokens_NC.view(-1).index_select(0, token_places).to(torch.int64)
    return StepBatch(token_ids_T, positions, paged, last_rows.tolist())


def largest_group(groups: list[GroupPlan]) -> int:
    """Most tokens that any DP group computes in a step."""
    return max(group.num_tokens for group in groups)
