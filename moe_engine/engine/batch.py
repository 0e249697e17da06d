"""From a group's plan to the tensors of a step.

Shape legend: T tokens of the step, S slots of the sequence table, C context length, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_engine.ops.attention import PagedBatch, PrefillSpan
from moe_engine.types.step import GroupPlan, NewSequence, SequenceStep


@dataclass(frozen=True)
class StepBatch:
    """The tensors of one step.

    Attributes:
        token_ids_T, positions_T: int64.
        paged: where the tokens stand in the KV cache; sequences that compute one position first.
        last_rows: per sequence step, in the plan's order, the row of its last token.
        slots: per sequence step, its slot in the table.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    paged: PagedBatch
    last_rows: np.ndarray
    slots: np.ndarray


class SequenceTable:
    """Tokens and block tables of the sequences that a DP group holds, one slot each.

    Token ids live on the device, so that a token sampled in one step feeds the next one without
    a visit to the host; block tables live on the host, where the scheduler's plans arrive.
    """

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._device = device
        self._tokens_SC = torch.zeros(num_slots, max_model_len, dtype=torch.int32, device=device)
        self._blocks_SB = np.zeros((num_slots, -(-max_model_len // block_size)), dtype=np.int32)
        self._num_blocks_S = np.zeros(num_slots, dtype=np.int64)
        self._slot_of: dict[int, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))

    def admit(self, sequence: NewSequence) -> None:
        """Give the sequence a slot with its tokens and an empty block table."""
        slot = self._free.pop()
        self._slot_of[sequence.seq_id] = slot
        self._num_blocks_S[slot] = 0
        tokens = torch.tensor(sequence.token_ids, dtype=torch.int32)
        self._tokens_SC[slot, : len(tokens)] = tokens.to(self._device, non_blocking=True)

    def retire(self, seq_id: int) -> None:
        """Free the sequence's slot."""
        self._free.append(self._slot_of.pop(seq_id))

    def build(self, steps: list[SequenceStep]) -> StepBatch:
        """Append the new blocks and lay out the step's tokens, one sequence after the other."""
        slots = np.array([self._slot_of[step.seq_id] for step in steps], dtype=np.int64)
        for slot, step in zip(slots, steps, strict=True):
            first = self._num_blocks_S[slot]
            self._num_blocks_S[slot] += len(step.new_blocks)
            self._blocks_SB[slot, first : first + len(step.new_blocks)] = step.new_blocks
        starts = np.array([step.start for step in steps], dtype=np.int64)
        counts = np.array([step.num_tokens for step in steps], dtype=np.int64)
        order = np.argsort(counts > 1, kind="stable")
        paged, token_ids_T, positions_T = self._lay_out(slots[order], starts[order], counts[order])
        last_rows = np.empty_like(order)
        last_rows[order] = counts[order].cumsum() - 1
        return StepBatch(token_ids_T, positions_T, paged, last_rows, slots)

    def _lay_out(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray
    ) -> tuple[PagedBatch, torch.Tensor, torch.Tensor]:
        """The batch, the token ids and the positions of sequences in the order of their rows."""
        first_rows = np.concatenate(([0], counts.cumsum()))
        slots_T = np.repeat(slots, counts)
        positions_T = np.arange(counts.sum()) + np.repeat(starts - first_rows[:-1], counts)
        blocks_T = self._blocks_SB[slots_T, positions_T // self._block_size]
        offsets_T = positions_T % self._block_size
        cache_slots_T = blocks_T.astype(np.int64) * self._block_size + offsets_T
        contexts = starts + counts
        num_decodes = int((counts == 1).sum())
        num_blocks = int(self._num_blocks_S[slots].max(initial=1))
        spans = zip(first_rows[:-1].tolist(), counts.tolist(), contexts.tolist(), strict=True)
        paged = PagedBatch(
            slots_T=self._to_device(cache_slots_T),
            block_tables_SB=self._to_device(self._blocks_SB[slots, :num_blocks]),
            context_lens_S=self._to_device(contexts.astype(np.int32)),
            query_starts_S=self._to_device(first_rows.astype(np.int32)),
            num_decodes=num_decodes,
            prefills=tuple(PrefillSpan(*span) for span in list(spans)[num_decodes:]),
        )
        positions = self._to_device(positions_T)
        token_ids_T = self._tokens_SC[self._to_device(slots_T), positions].to(torch.int64)
        return paged, token_ids_T, positions

    def append_sampled(
        self, slots: np.ndarray, positions: np.ndarray, tokens: torch.Tensor
    ) -> None:
        """Put sampled tokens (on the device) where the next step reads its inputs."""
        where = self._to_device(slots), self._to_device(positions)
        self._tokens_SC[where] = tokens.to(torch.int32)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def largest_group(groups: list[GroupPlan]) -> int:
    """Most tokens that any DP group computes in a step."""
    return max(group.num_tokens for group in groups)
