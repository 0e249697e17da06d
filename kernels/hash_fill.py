"""Fills many tensors with hashes of their elements' indices, one launch for all of one shape.

Legend: F tensors to fill, R rows, C columns of each.

The hash is the one of `moe_engine.ops.fill`, bit for bit. A model is thousands of tensors of a few
shapes, so the kernel finds its tensors in a table on the device rather than in its arguments: the
host launches a handful of times whatever the number of experts. Writing bounds it, not the
arithmetic (about twenty integer operations an element).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch_kernel

# splitmix64's increment and multipliers
GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
# The upper 23 bits u make the odd number 2 * u + 1 - 2^23.
DROPPED_BITS = tl.constexpr(64 - 23)
LEAST_ODD = tl.constexpr(1 - (1 << 23))

TABLE_COLUMNS = 4
"""int64 columns of the table: address, key, first row, first column."""

TILE_ELEMENTS = 4096  # 32 a thread: their 64-bit hashes stay in registers
MAX_BLOCK_C = 1024
MAX_GRID_Y = 65535


@triton.jit
def _mix(z):
    """splitmix64's finaliser of uint64 values."""
    z = (z ^ (z >> 30)) * MIX_1
    z = (z ^ (z >> 27)) * MIX_2
    return z ^ (z >> 31)


@triton.jit
def _hash_fill_kernel(
    table_ptr,
    like_ptr,
    num_rows,
    num_columns,
    row_stride,
    scale,
    HASH_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write tile ``program_id(0)`` of tensor ``program_id(1)``.

    Shapes: table int64 [F, 4]; every tensor [R, C] with ``row_stride`` and columns side by side,
    of the dtype that ``like_ptr`` points to. An element's hash is that of its row's hash and its
    column; without HASH_ROWS (vectors), that of the key and its column.

    Example, a value: a hash whose upper 23 bits are 5 becomes the odd number
    2 * 5 + 1 - 2^23 = -8388597, times ``scale``.
    """
    fill = tl.program_id(1).to(tl.int64)
    address = tl.load(table_ptr + fill * 4)
    key = tl.load(table_ptr + fill * 4 + 1).to(tl.uint64)
    first_row = tl.load(table_ptr + fill * 4 + 2)
    first_column = tl.load(table_ptr + fill * 4 + 3)

    tiles_per_row = tl.cdiv(num_columns, BLOCK_C)
    row_tile = tl.program_id(0) // tiles_per_row
    column_tile = tl.program_id(0) % tiles_per_row
    # int64, because row * stride passes 2^31 for a vocabulary.
    rows = row_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    columns = column_tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]

    if HASH_ROWS:
        row_hashes = _mix(key + (rows + first_row + 1).to(tl.uint64) * GAMMA)
    else:
        row_hashes = key + (rows * 0).to(tl.uint64)
    hashes = _mix(row_hashes + (columns + first_column + 1).to(tl.uint64) * GAMMA)
    odd = 2 * (hashes >> DROPPED_BITS).to(tl.int32) + LEAST_ODD
    values = odd.to(tl.float32) * scale

    dtype = like_ptr.dtype.element_ty
    target = address.to(tl.pointer_type(dtype)) + rows * row_stride + columns
    mask = (rows < num_rows) & (columns < num_columns)
    tl.store(target, values.to(dtype), mask=mask)


def hash_fill(
    table_F4: torch.Tensor, like: torch.Tensor, row_stride: int, scale: float, *, hash_rows: bool
) -> None:
    """Fill the tensors of a table, all like ``like`` [R, C], on the table's device.

    Args:
        table_F4: int64, see `TABLE_COLUMNS`; the addresses must stay valid until the stream is
            through.
        like: one of the tensors; its shape and dtype are those of all.
        row_stride: elements between their rows.
        scale: what the odd numbers in (-2^23, 2^23) are multiplied by, in float32.
        hash_rows: False for vectors given as one row.
    """
    num_rows, num_columns = like.shape
    block_c = min(triton.next_power_of_2(num_columns), MAX_BLOCK_C)
    block_r = min(max(1, TILE_ELEMENTS // block_c), triton.next_power_of_2(num_rows))
    num_tiles = triton.cdiv(num_rows, block_r) * triton.cdiv(num_columns, block_c)
    for first in range(0, table_F4.shape[0], MAX_GRID_Y):
        table = table_F4[first : first + MAX_GRID_Y]
        launch_kernel(
            _hash_fill_kernel,
            (num_tiles, table.shape[0]),
            table,
            like,
            num_rows,
            num_columns,
            row_stride,
            scale,
            HASH_ROWS=hash_rows,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
        )
