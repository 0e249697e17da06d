"""A step's tensors, against what the plan says in words."""

import random
from dataclasses import replace

import pytest
import torch

from moe_engine.engine.batch import build_batch
from moe_engine.engine.table import SequenceTable
from moe_engine.ops.decode import append_tokens
from moe_engine.ops.prefill_plan import PrefillSpan
from moe_engine.types.sampling import SamplingParams
from moe_engine.types.step import NewSequence, SequenceStep

BLOCK_SIZE = 4
CPU = torch.device("cpu")


def sequence(seq_id, token_ids):
    return NewSequence(seq_id, token_ids, len(token_ids), SamplingParams())


def build(table, steps, num_scored=None):
    return build_batch(table, steps, table.advance(steps), num_scored or [0] * len(steps))


def append(table, slot, position, token):
    slots, positions = (torch.tensor([value], dtype=torch.int32) for value in (slot, position))
    append_tokens(slots, positions, torch.tensor([token]), table.tokens_NC)


def test_mixed_step_lays_out_each_sequences_tokens_positions_and_slots():
    table = SequenceTable(3, 32, BLOCK_SIZE, CPU)
    prompts = {7: list(range(100, 109)), 8: [5], 9: list(range(200, 210))}
    table.admit([sequence(seq_id, prompt) for seq_id, prompt in prompts.items()])
    table.advance([SequenceStep(7, 0, 6, [20, 3]), SequenceStep(8, 0, 1, [4])])
    append(table, 1, 1, 77)
    steps = [
        SequenceStep(9, 4, 5, [9, 1, 30]),
        SequenceStep(8, 1, 1, uniform=0.5),
        SequenceStep(7, 6, 3, [0], uniform=0.5),
    ]
    slots = table.advance(steps)
    batch = build_batch(table, steps, slots, [5, 0, 2])
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
    assert batch.needed.rows_R.tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 8]
    assert slots == [2, 1, 0]


@pytest.mark.parametrize("seed", range(30))
def test_every_row_is_where_its_sequence_says(seed):
    """Random steps on a table in use, each row looked up by itself in plain Python."""
    choose = random.Random(seed)
    block_size = choose.choice((1, 4, 16))
    table = SequenceTable(12, 96, block_size, CPU)
    tokens, blocks = {}, {}
    for seq_id in range(choose.randrange(1, 12)):
        tokens[seq_id] = [choose.randrange(1000) for _ in range(choose.randrange(1, 96))]
        blocks[seq_id] = []
        if choose.random() < 0.5:
            table.admit([sequence(100 + seq_id, [1] * 90)])
            table.retire(100 + seq_id)
        table.admit([sequence(seq_id, tokens[seq_id])])
    starts = dict.fromkeys(tokens, 0)
    for _ in range(3):
        steps = []
        for seq_id in choose.sample(sorted(tokens), len(tokens)):
            left = len(tokens[seq_id]) - starts[seq_id]
            if left == 0:
                continue
            count = choose.choice((1, left, choose.randint(1, left)))
            needed = -(-(starts[seq_id] + count) // block_size) - len(blocks[seq_id])
            new_blocks = [choose.randrange(500) for _ in range(needed + choose.randrange(2))]
            new_blocks = new_blocks[: -(-96 // block_size) - len(blocks[seq_id])]
            blocks[seq_id] += new_blocks
            steps.append(SequenceStep(seq_id, starts[seq_id], count, new_blocks))
            starts[seq_id] += count
        steps = [
            replace(step, uniform=0.5 if step.end == len(tokens[step.seq_id]) else None)
            for step in steps
        ]
        num_scored = [choose.choice((0, step.num_tokens - 1)) for step in steps]
        batch = build(table, steps, num_scored)
        check_rows(batch, steps, tokens, blocks, block_size)
        check_needed_rows(batch, steps, num_scored, tokens)


def check_rows(batch, steps, tokens, blocks, block_size):
    paged = batch.paged
    singles = [step for step in steps if step.num_tokens == 1]
    in_row_order = singles + [step for step in steps if step.num_tokens > 1]
    assert paged.num_decodes == len(singles)
    rows, starts = [], [0]
    for step in in_row_order:
        for position in range(step.start, step.start + step.num_tokens):
            block = blocks[step.seq_id][position // block_size]
            slot = block * block_size + position % block_size
            rows.append((tokens[step.seq_id][position], position, slot))
        starts.append(len(rows))
    found = zip(
        batch.token_ids_T.tolist(), batch.positions_T.tolist(), paged.slots_T.tolist(), strict=True
    )
    assert list(found) == rows
    assert paged.num_tokens == len(rows)
    assert paged.query_starts_S.tolist() == starts
    contexts = [step.start + step.num_tokens for step in in_row_order]
    assert paged.context_lens_S.tolist() == contexts
    for step, context, table in zip(
        in_row_order, contexts, paged.block_tables_SB.tolist(), strict=True
    ):
        used = -(-context // block_size)
        assert table[:used] == blocks[step.seq_id][:used]
    spans = zip(starts, in_row_order, contexts, strict=False)
    assert paged.prefills == tuple(
        PrefillSpan(start, step.num_tokens, context)
        for start, step, context in spans
        if step.num_tokens > 1
    )


def check_needed_rows(batch, steps, num_scored, tokens):
    """Each needed row has the token and the position whose logits somebody wants."""
    wanted = [
        (step.seq_id, step.start + i)
        for step, num in zip(steps, num_scored, strict=True)
        for i in range(num)
    ]
    wanted += [(step.seq_id, step.end - 1) for step in steps if step.uniform is not None]
    if batch.needed is None:
        assert len(wanted) == len(batch.token_ids_T)
        rows = list(range(len(wanted)))
    else:
        rows = batch.needed.rows_R.tolist()
    found = [(int(batch.token_ids_T[row]), int(batch.positions_T[row])) for row in rows]
    assert found == [(tokens[seq_id][position], position) for seq_id, position in wanted]
    assert len(set(rows)) == len(rows)
    if batch.needed is not None:
        assert (batch.needed.as_decodes is None) == any(num_scored)
        check_decodes(batch, rows)


def check_decodes(batch, rows):
    """As decodes, needed rows are where they are as rows of the step."""
    decodes, paged = batch.needed.as_decodes, batch.paged
    if decodes is None:
        return
    assert decodes.num_decodes == decodes.num_tokens == len(rows)
    assert decodes.slots_T.tolist() == paged.slots_T[rows].tolist()
    assert decodes.context_lens_S.tolist() == (batch.positions_T[rows] + 1).tolist()
    starts = paged.query_starts_S.tolist()
    for row, table in zip(rows, decodes.block_tables_SB.tolist(), strict=True):
        assert table == paged.block_tables_SB[starts.index(row + 1) - 1].tolist()


def test_slot_of_a_retired_sequence_starts_afresh():
    table = SequenceTable(1, 16, BLOCK_SIZE, CPU)
    table.admit([sequence(1, list(range(16)))])
    build(table, [SequenceStep(1, 0, 16, [3, 2, 1, 0])])
    table.retire(1)
    table.admit([sequence(2, [50, 51])])
    batch = build(table, [SequenceStep(2, 0, 2, [5])])
    assert batch.token_ids_T.tolist() == [50, 51]
    assert batch.paged.slots_T.tolist() == [20, 21]
    assert batch.paged.block_tables_SB.tolist() == [[5]]


def test_last_token_of_a_full_context_is_kept():
    table = SequenceTable(1, 4, BLOCK_SIZE, CPU)
    table.admit([sequence(1, [1, 2, 3])])
    build(table, [SequenceStep(1, 0, 3, [0])])
    append(table, 0, 3, 9)
    assert build(table, [SequenceStep(1, 3, 1)]).token_ids_T.tolist() == [9]


def test_a_step_that_needs_all_rows_in_order_picks_none():
    table = SequenceTable(2, 16, BLOCK_SIZE, CPU)
    table.admit([sequence(1, [5, 6, 7]), sequence(2, [8])])
    scored = SequenceStep(1, 0, 3, [4], uniform=0.5)
    alone = SequenceStep(2, 0, 1, [6], uniform=0.5)
    assert build(table, [alone]).needed is None
    assert build(table, [scored], [2]).needed is None
    assert build(table, [alone, scored], [0, 2]).needed.rows_R.tolist() == [1, 2, 0, 3]


def test_a_chunk_that_ends_inside_its_prompt_needs_no_row():
    table = SequenceTable(1, 16, BLOCK_SIZE, CPU)
    table.admit([sequence(1, list(range(9)))])
    assert build(table, [SequenceStep(1, 0, 4, [2])]).needed.rows_R.tolist() == []


def test_laying_out_needs_no_value_from_the_device():
    # A meta tensor has no values: reading one, or a shape that depends on one, raises.
    table = SequenceTable(3, 32, BLOCK_SIZE, torch.device("meta"))
    table.admit([sequence(1, [5, 6, 7]), sequence(2, [8])])
    batch = build(table, [SequenceStep(1, 0, 3, [4]), SequenceStep(2, 0, 1, [6])])
    assert batch.token_ids_T.shape == (4,)
    assert batch.paged.slots_T.device.type == "meta"


def test_idle_step_is_empty():
    batch = build(SequenceTable(2, 8, BLOCK_SIZE, CPU), [])
    assert batch.token_ids_T.shape == batch.positions_T.shape == (0,)
    assert batch.needed is None
    assert batch.paged.num_decodes == 0
    assert batch.paged.prefills == ()
    assert batch.paged.query_starts_S.tolist() == [0]
