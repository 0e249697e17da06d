"""From a group's steps to the tensors of a step of any kind.

A step that only decodes runs as a CUDA graph instead, where there is one (see `engine.decode`).

Shape legend: T tokens of the step, S sequences, B blocks, R rows that need logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_engine.engine.table import SequenceTable
from moe_engine.ops.paged_batch import NeededRows, PagedBatch
from moe_engine.ops.prefill_plan import PrefillSpan
from moe_engine.ops.transfer import stage
from moe_engine.types.step import GroupPlan, SequenceStep


@dataclass(frozen=True)
class StepBatch:
    """The tensors of one step.

    Attributes:
        token_ids_T, positions_T: int64.
        paged: where the tokens stand in the KV cache; sequences that compute one position first.
        needed: of each sequence in the plan's order the rows whose logits score its prompt, then
            the last row of each that samples; None if these are all T rows in order.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    paged: PagedBatch
    needed: NeededRows | None


def build_batch(
    table: SequenceTable,
    steps: list[SequenceStep],
    slots: list[int],
    num_scored: Sequence[int],
    *,
    in_full: bool = False,
) -> StepBatch:
    """Lay out the step's tokens, one sequence after the other; nobody waits for the device.

    Args:
        slots: what `SequenceTable.advance` returned for ``steps``.
        num_scored: how many of a step's positions, the first ones, need logits to score the prompt.
        in_full: nobody attends to the needed rows alone (`NeededRows.as_decodes`).
    """
    slots_S = np.array(slots, dtype=np.int64)
    starts_S = np.array([step.start for step in steps], dtype=np.int64)
    counts_S = np.array([step.num_tokens for step in steps], dtype=np.int64)
    order = np.argsort(counts_S > 1, kind="stable")
    slots_S, starts_S, counts_S = slots_S[order], starts_S[order], counts_S[order]
    contexts_S = starts_S + counts_S
    ends_S = counts_S.cumsum()
    firsts_S = ends_S - counts_S

    num_tokens = int(counts_S.sum())
    place_S = order.argsort()  # of the plan's sequences in the batch
    needed_R = _needed_rows(steps, firsts_S[place_S], num_scored)
    sampling_S = [step.uniform is not None for step in steps]
    positions_T = np.arange(num_tokens) + np.repeat(starts_S - firsts_S, counts_S)
    slots_T = np.repeat(slots_S, counts_S)
    tokens_NC, blocks_NB, block_size = table.tokens_NC, table.blocks_NB, table.block_size
    positions, token_places, block_places, offsets, slots_of_rows, *others = stage(
        [
            positions_T,
            slots_T * tokens_NC.shape[1] + positions_T,
            slots_T * blocks_NB.shape[1] + positions_T // block_size,
            positions_T % block_size,
            slots_S,
            contexts_S,
            np.append(firsts_S, num_tokens),
            needed_R,
            place_S[sampling_S],
        ],
        tokens_NC.device,
        torch.int64,
    )
    contexts, starts, rows_R, ends = others
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
        query_starts_S=starts.to(torch.int32),
        num_decodes=num_decodes,
        prefills=tuple(PrefillSpan(*span) for span in spans),
    )
    token_ids_T = tokens_NC.view(-1).index_select(0, token_places).to(torch.int64)
    if np.array_equal(needed_R, np.arange(num_tokens)):
        return StepBatch(token_ids_T, positions, paged, needed=None)
    as_decodes = None
    if not (in_full or any(num_scored)):
        as_decodes = PagedBatch(
            slots_T=paged.slots_T.index_select(0, rows_R),
            block_tables_SB=paged.block_tables_SB.index_select(0, ends),
            context_lens_S=paged.context_lens_S.index_select(0, ends),
            query_starts_S=torch.arange(len(rows_R) + 1, dtype=torch.int32, device=rows_R.device),
            num_decodes=len(rows_R),
            prefills=(),
        )
    return StepBatch(token_ids_T, positions, paged, NeededRows(rows_R, as_decodes))


def _needed_rows(
    steps: list[SequenceStep], firsts: np.ndarray, num_scored: Sequence[int]
) -> np.ndarray:
    """See `StepBatch.needed`; ``firsts`` are the steps' first rows, in the plan's order."""
    scoring = [np.arange(first, first + num) for first, num in zip(firsts, num_scored, strict=True)]
    sampling = [
        first + step.num_tokens - 1
        for step, first in zip(steps, firsts, strict=True)
        if step.uniform is not None
    ]
    return np.concatenate([*scoring, np.array(sampling, dtype=np.int64)])


def largest_group(groups: list[GroupPlan]) -> int:
    """Most tokens that any DP group computes in a step."""
    return max(group.num_tokens for group in groups)
