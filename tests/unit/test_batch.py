"""A step's tensors, against what the plan says in words."""

import numpy as np
import torch

from moe_engine.engine.batch import SequenceTable
from moe_engine.ops.attention import PrefillSpan
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import NewSequence, SequenceStep

BLOCK_SIZE = 4


def admitted(table, seq_id, token_ids):
    table.admit(NewSequence(seq_id, token_ids, len(token_ids), SamplingParams()))


def test_mixed_step_lays_out_each_sequences_tokens_positions_and_slots():
    table = SequenceTable(3, 32, BLOCK_SIZE, torch.device("cpu"))
    prompts = {7: list(range(100, 109)), 8: [5], 9: list(range(200, 210))}
    for seq_id, prompt in prompts.items():
        admitted(table, seq_id, prompt)
    table.build([SequenceStep(7, 0, 6, [20, 3]), SequenceStep(8, 0, 1, [4])])
    table.append_sampled(np.array([1]), np.array([1]), torch.tensor([77]))
    steps = [SequenceStep(9, 4, 5, [9, 1, 30]), SequenceStep(8, 1, 1), SequenceStep(7, 6, 3, [0])]
    batch = table.build(steps)
    paged = batch.paged
    assert batch.token_ids_T.tolist() == [77, *range(204, 209), *range(106, 109)]
    assert batch.positions_T.tolist() == [1, 4, 5, 6, 7, 8, 6, 7, 8]
    assert paged.slots_T.tolist() == [4 * 4 + 1, 4, 5, 6, 7, 30 * 4, 3 * 4 + 2, 3 * 4 + 3, 0]
    assert paged.num_decodes == 1
    assert paged.prefills == (PrefillSpan(1, 5, 9), PrefillSpan(6, 3, 9))
    assert paged.context_lens_S.tolist() == [2, 9, 9]
    assert paged.query_starts_S.tolist() == [0, 1, 6, 9]
    assert paged.block_tables_SB[0, :1].tolist() == [4]
    assert paged.block_tables_SB[1:].tolist() == [[9, 1, 30], [20, 3, 0]]
    assert batch.last_rows.tolist() == [5, 0, 8]
    assert batch.slots.tolist() == [2, 1, 0]


def test_slot_of_a_retired_sequence_starts_afresh():
    table = SequenceTable(1, 16, BLOCK_SIZE, torch.device("cpu"))
    admitted(table, 1, list(range(16)))
    table.build([SequenceStep(1, 0, 16, [3, 2, 1, 0])])
    table.retire(1)
    admitted(table, 2, [50, 51])
    batch = table.build([SequenceStep(2, 0, 2, [5])])
    assert batch.token_ids_T.tolist() == [50, 51]
    assert batch.paged.slots_T.tolist() == [20, 21]
    assert batch.paged.block_tables_SB.tolist() == [[5]]


def test_last_token_of_a_full_context_is_kept():
    table = SequenceTable(1, 4, BLOCK_SIZE, torch.device("cpu"))
    admitted(table, 1, [1, 2, 3])
    table.build([SequenceStep(1, 0, 3, [0])])
    table.append_sampled(np.array([0]), np.array([3]), torch.tensor([9]))
    assert table.build([SequenceStep(1, 3, 1)]).token_ids_T.tolist() == [9]


def test_idle_step_is_empty():
    batch = SequenceTable(2, 8, BLOCK_SIZE, torch.device("cpu")).build([])
    assert batch.token_ids_T.shape == batch.positions_T.shape == (0,)
    assert batch.paged.num_decodes == 0
    assert batch.paged.prefills == ()
    assert batch.paged.query_starts_S.tolist() == [0]
