"""Start and end of a decode step on the device: inputs from the sequence table, tokens into it.

Legend: S rows of the step, N slots of the table, C longest context, B blocks of the longest
context, L tokens a block. A row whose slot is negative is padding.

Both kernels move a few kilobytes; they exist to make one launch of what would be a dozen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Block ids that a program copies at once.
BLOCK_B = 256
# Rows of a program that appends tokens.
BLOCK_S = 128


@triton.jit
def _prepare_kernel(
    slots_ptr,
    positions_ptr,
    tokens_ptr,
    blocks_ptr,
    token_ids_ptr,
    positions_out_ptr,
    cache_slots_ptr,
    context_lens_ptr,
    tables_ptr,
    tokens_stride,
    blocks_stride,
    tables_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program makes the inputs of one row.

    Shapes: slots, positions int32 [S]; tokens int32 [N, C]; blocks int32 [N, B]; outputs token ids,
    positions and cache slots int64 [S], context lengths int32 [S], block tables int32 [S, B].

    Example, L = 4: row 0 has slot 2 and position 5; tokens[2] = [7, 8, 9, 7, 8, 6, ...],
    blocks[2] = [30, 11, ...].
        token id 6, position 5, cache slot 11 * 4 + 1 = 45, context length 6, table [30, 11]
    A row with slot -1 gets token id 0, position 0, cache slot -1, context length 0, no table.
    """
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    position = tl.load(positions_ptr + row)
    if slot < 0:
        tl.store(token_ids_ptr + row, 0)
        tl.store(positions_out_ptr + row, 0)
        tl.store(cache_slots_ptr + row, -1)
        tl.store(context_lens_ptr + row, 0)
    else:
        token = tl.load(tokens_ptr + slot * tokens_stride + position)
        block = tl.load(blocks_ptr + slot * blocks_stride + position // BLOCK_SIZE).to(tl.int64)
        tl.store(token_ids_ptr + row, token.to(tl.int64))
        tl.store(positions_out_ptr + row, position.to(tl.int64))
        tl.store(cache_slots_ptr + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
        tl.store(context_lens_ptr + row, position + 1)
        num_blocks = position // BLOCK_SIZE + 1
        for first in range(0, num_blocks, BLOCK_B):
            columns = first + tl.arange(0, BLOCK_B)
            used = columns < num_blocks
            ids = tl.load(blocks_ptr + slot * blocks_stride + columns, mask=used)
            tl.store(tables_ptr + row.to(tl.int64) * tables_stride + columns, ids, mask=used)


@triton.jit
def _append_kernel(
    slots_ptr,
    positions_ptr,
    sampled_ptr,
    tokens_ptr,
    num_rows,
    tokens_stride,
    BLOCK_S: tl.constexpr,
):
    """Store the token of each row at its position of its slot.

    Shapes: slots, positions int32 [S]; sampled int64 [S]; tokens int32 [N, C].

    Example: slots [2, -1], positions [6, 0], sampled [40, 9]: tokens[2, 6] = 40, nothing else.
    """
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=inside, other=-1).to(tl.int64)
    positions = tl.load(positions_ptr + rows, mask=inside, other=0)
    sampled = tl.load(sampled_ptr + rows, mask=inside, other=0)
    tl.store(tokens_ptr + slots * tokens_stride + positions, sampled.to(tl.int32), mask=slots >= 0)


def prepare_decode(
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    tokens_NC: torch.Tensor,
    blocks_NB: torch.Tensor,
    block_size: int,
    token_ids_S: torch.Tensor,
    positions_out_S: torch.Tensor,
    cache_slots_S: torch.Tensor,
    context_lens_S: torch.Tensor,
    block_tables_SB: torch.Tensor,
) -> None:
    """Fill the five outputs; the arguments are checked by the caller."""
    _prepare_kernel[(slots_S.shape[0],)](
        slots_S,
        positions_S,
        tokens_NC,
        blocks_NB,
        token_ids_S,
        positions_out_S,
        cache_slots_S,
        context_lens_S,
        block_tables_SB,
        tokens_NC.stride(0),
        blocks_NB.stride(0),
        block_tables_SB.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK_B=BLOCK_B,
        num_warps=2,
    )


def append_tokens(
    slots_S: torch.Tensor,
    positions_S: torch.Tensor,
    sampled_S: torch.Tensor,
    tokens_NC: torch.Tensor,
) -> None:
    """Write the sampled tokens to the table; the arguments are checked by the caller."""
    num_rows = slots_S.shape[0]
    _append_kernel[(triton.cdiv(num_rows, BLOCK_S),)](
        slots_S,
        positions_S,
        sampled_S,
        tokens_NC,
        num_rows,
        tokens_NC.stride(0),
        BLOCK_S=BLOCK_S,
        num_warps=4,
    )
