"""Tokens and block tables of the sequences that a DP group holds, on the device.

A token sampled in one step feeds the next one without a visit to the host, and a step brings only
what is new: the tokens of admitted sequences and the blocks appended.

Shape legend: N slots of the table, C longest context, B blocks of the longest context.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from moe_engine.ops.transfer import stage
from moe_engine.types.step import NewSequence, SequenceStep


class SequenceTable:
    """One slot for each of up to ``num_slots`` sequences.

    Attributes:
        tokens_NC: int32 token ids, as far as they are known to the device.
        blocks_NB: int32 ids of each sequence's KV blocks.
        block_size: tokens of a block.
    """

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self._device = device
        num_blocks = -(-max_model_len // block_size)
        self.tokens_NC = torch.zeros(num_slots, max_model_len, dtype=torch.int32, device=device)
        self.blocks_NB = torch.zeros(num_slots, num_blocks, dtype=torch.int32, device=device)
        self._num_blocks = [0] * num_slots
        self._slot_of: dict[int, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))

    def admit(self, sequences: list[NewSequence]) -> None:
        """Give each sequence a slot with its tokens and an empty block table."""
        if not sequences:
            return
        sizes = [len(sequence.token_ids) for sequence in sequences]
        ends = list(accumulate(sizes))
        [tokens] = stage([[t for new in sequences for t in new.token_ids]], self._device)
        for sequence, size, end in zip(sequences, sizes, ends, strict=True):
            slot = self._free.pop()
            self._slot_of[sequence.seq_id] = slot
            self._num_blocks[slot] = 0
            self.tokens_NC[slot, :size] = tokens[end - size : end]

    def retire(self, seq_id: int) -> None:
        """Free the sequence's slot."""
        self._free.append(self._slot_of.pop(seq_id))

    def advance(self, steps: list[SequenceStep]) -> list[int]:
        """Append the new blocks of a step; returns each sequence's slot."""
        slots = [self._slot_of[step.seq_id] for step in steps]
        width = self.blocks_NB.shape[1]
        places: list[int] = []
        block_ids: list[int] = []
        for slot, step in zip(slots, steps, strict=True):
            if step.new_blocks:
                first = slot * width + self._num_blocks[slot]
                places.extend(range(first, first + len(step.new_blocks)))
                block_ids += step.new_blocks
                self._num_blocks[slot] += len(step.new_blocks)
                assert self._num_blocks[slot] <= width
        if places:
            places_M, block_ids_M = stage([places, block_ids], self._device)
            self.blocks_NB.view(-1)[places_M.to(torch.int64)] = block_ids_M
        return slots
