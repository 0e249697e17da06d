"""Inputs and outputs of a decode step: the reference row by row, the kernels against it.

On a machine without a GPU, the kernels run in Triton's interpreter.

Legend: S rows, N slots of the table, C longest context, B blocks, L tokens a block.
"""

from __future__ import annotations

import pytest
import torch

from moe_engine.ops.decode import DecodeInputs, append_tokens, prepare_decode
from moe_engine.ops.reference import decode as reference
from tests.kernels.triton_device import DEVICE, needs_triton

# (rows, of them padding, longest context, L): one block copied, several, one token a block.
CASES = [(1, 0, 5, 16), (4, 1, 64, 4), (9, 9, 64, 4), (130, 3, 600, 1), (17, 0, 5000, 16)]


def problem(num_rows, num_padding, longest, block_size, device):
    """Rows in a table of twice as many slots; the context lengths are 1, the longest, others."""
    num_slots, num_real = 2 * num_rows, num_rows - num_padding
    slots_S = torch.full((num_rows,), -1, dtype=torch.int32)
    slots_S[:num_real] = torch.randperm(num_slots)[:num_real].to(torch.int32)
    positions_S = torch.randint(longest, (num_rows,), dtype=torch.int32)
    positions_S[:2] = torch.tensor([longest - 1, 0], dtype=torch.int32)[:num_rows]
    tokens_NC = torch.randint(150_000, (num_slots, longest), dtype=torch.int32)
    num_blocks = -(-longest // block_size)
    blocks_NB = torch.randint(2**31 - 1, (num_slots, num_blocks), dtype=torch.int32)
    return [tensor.to(device) for tensor in (slots_S, positions_S, tokens_NC, blocks_NB)]


def tensors_of(inputs):
    """The five outputs, in the order of the arguments."""
    return tuple(getattr(inputs, name) for name in inputs.__dataclass_fields__)


def dirty_inputs(num_rows, num_blocks, device):
    """Outputs that still hold the step before."""
    inputs = DecodeInputs.empty(num_rows, num_blocks, device)
    for tensor in tensors_of(inputs):
        tensor.fill_(77)
    return inputs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_looks_up_each_row(case):
    block_size = case[3]
    slots_S, positions_S, tokens_NC, blocks_NB = problem(*case, torch.device("cpu"))
    out = dirty_inputs(case[0], blocks_NB.shape[1], torch.device("cpu"))
    prepare_decode(slots_S, positions_S, tokens_NC, blocks_NB, block_size, out)
    for row, (slot, position) in enumerate(
        zip(slots_S.tolist(), positions_S.tolist(), strict=True)
    ):
        found = [tensor[row].item() for tensor in tensors_of(out)[:4]]
        if slot < 0:
            assert found == [0, 0, -1, 0]
            continue
        block = blocks_NB[slot, position // block_size].item()
        cache_slot = block * block_size + position % block_size
        assert found == [tokens_NC[slot, position].item(), position, cache_slot, position + 1]
        used = position // block_size + 1
        assert torch.equal(out.block_tables_SB[row, :used], blocks_NB[slot, :used])


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_prepares_what_the_reference_does(case):
    from moe_engine.kernels import prepare_decode as kernels

    block_size = case[3]
    slots_S, positions_S, tokens_NC, blocks_NB = problem(*case, DEVICE)
    expected, found = (dirty_inputs(case[0], blocks_NB.shape[1], DEVICE) for _ in range(2))
    arguments = slots_S, positions_S, tokens_NC, blocks_NB, block_size
    reference.prepare_decode(*arguments, *tensors_of(expected))
    kernels.prepare_decode(*arguments, *tensors_of(found))
    for name in ("token_ids_S", "positions_S", "cache_slots_S", "context_lens_S"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for row, context in enumerate(expected.context_lens_S.tolist()):
        used = -(-context // block_size)
        tables = found.block_tables_SB[row], expected.block_tables_SB[row]
        assert torch.equal(tables[0][:used], tables[1][:used])
        assert (tables[0][used:] == 77).all()  # no more is copied than is needed


@pytest.mark.parametrize("num_rows", [0, 1, 5, 300])
def test_reference_appends_the_tokens_of_real_rows_only(num_rows):
    check_append(append_tokens, num_rows, torch.device("cpu"))


@needs_triton
@pytest.mark.parametrize("num_rows", [1, 5, 300])
def test_kernel_appends_the_tokens_of_real_rows_only(num_rows):
    from moe_engine.kernels import prepare_decode as kernels

    check_append(kernels.append_tokens, num_rows, DEVICE)


def check_append(append, num_rows, device):
    slots_S, positions_S, tokens_NC, _ = problem(num_rows + 2, 2, 40, 8, device)
    slots_S[num_rows // 2] = -1
    sampled_S = torch.randint(150_000, (num_rows + 2,), device=device)
    expected = tokens_NC.tolist()
    rows = zip(slots_S.tolist(), positions_S.tolist(), sampled_S.tolist(), strict=True)
    for slot, position, token in rows:
        if slot >= 0:
            expected[slot][position] = token
    append(slots_S, positions_S, sampled_S, tokens_NC)
    assert tokens_NC.tolist() == expected
