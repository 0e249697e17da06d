"""Start and end of a decode step on the device: inputs from the sequence table, tokens into it.

Legend: S rows of the step, N slots of the table, C longest context, B blocks of the longest
context, L tokens a block. A row whose slot is negative is padding.

Both kernels move a few kilobytes; they exist to make one launch of what would be a dozen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import launch_kernel, supports_pdl

# Block ids that a program copies.
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
    """Programs (row, c) copy c-th parts of the block tables; those with c = 0 do the rest too.

    Shapes: slots, positions int32 [S]; tokens int32 [N, C]; blocks int32 [N, B]; outputs token ids,
    positions and cache slots int64 [S], context lengths int32 [S], block tables int32 [S, B].

    Example, L = 4: row 0 has slot 2 and position 5; tokens[2] = [7, 8, 9, 7, 8, 6, ...],
    blocks[2] = [30, 11, ...].
        token id 6, position 5, cache slot 11 * 4 + 1 = 45, context length 6, table [30, 11]
    A row with slot -1 gets token id 0, position 0, cache slot -1, context length 0, no table.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    is_real = slot >= 0
    position = tl.where(is_real, tl.load(positions_ptr + row), 0)
    index = position // BLOCK_SIZE

    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=is_real, other=0)
    block = tl.load(blocks_ptr + slot * blocks_stride + index, mask=is_real, other=0)
    cache_slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    is_first = part == 0
    tl.store(token_ids_ptr + row, token.to(tl.int64), mask=is_first)
    tl.store(positions_out_ptr + row, position.to(tl.int64), mask=is_first)
    tl.store(cache_slots_ptr + row, tl.where(is_real, cache_slot, -1), mask=is_first)
    tl.store(context_lens_ptr + row, tl.where(is_real, position + 1, 0), mask=is_first)

    columns = part * BLOCK_B + tl.arange(0, BLOCK_B)
    used = (columns <= index) & is_real
    ids = tl.load(blocks_ptr + slot * blocks_stride + columns, mask=used, other=0)
    tl.store(tables_ptr + row.to(tl.int64) * tables_stride + columns, ids, mask=used)


@triton.jit(do_not_specialize=["num_rows"])
def _append_kernel(
    slots_ptr,
    positions_ptr,
    sampled_ptr,
    tokens_ptr,
    num_rows,
    tokens_stride,
    BLOCK_S: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Store the token of each row at its position of its slot.

    Shapes: slots, positions int32 [S]; sampled int64 [S]; tokens int32 [N, C].

    Example: slots [2, -1], positions [6, 0], sampled [40, 9]: tokens[2, 6] = 40, nothing else.
    """
    if USE_PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
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
    grid = (slots_S.shape[0], triton.cdiv(blocks_NB.shape[1], BLOCK_B))
    launch_kernel(
        _prepare_kernel,
        grid,
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
    use_pdl = supports_pdl(slots_S.device)
    launch_kernel(
        _append_kernel,
        (triton.cdiv(num_rows, BLOCK_S),),
        slots_S,
        positions_S,
        sampled_S,
        tokens_NC,
        num_rows,
        tokens_NC.stride(0),
        BLOCK_S=BLOCK_S,
        USE_PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
