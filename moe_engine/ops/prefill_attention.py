"""Prefill attention on Hopper: what the CUDA kernel takes, the order of its tiles, and its launch.

Shape legend: T tokens, S sequences, P spans, M tiles, N query heads, G KV heads, D head dimension,
B blocks, L tokens a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_engine.ops import hopper
from moe_engine.ops.prefill_plan import PrefillSpan
from moe_engine.ops.transfer import stage

# As in csrc/prefill_attention.h.
TILE_ROWS = 128
MAX_SPANS = MAX_SPAN_TILES = 1 << 16
# Over the context, in a step of a tile.
STEP_TOKENS = 128


@dataclass(frozen=True)
class PrefillTiles:
    """What a launch computes, on the device, as ``csrc/prefill_attention.h`` wants it.

    The kernel reads it before the kernel before it has ended, so it must be complete before that
    one begins, or be written by a transfer behind it.

    Attributes:
        spans_P4: int32, of each span: first row, rows, context, row of the block table.
        tiles_M: int32, span << 16 | tile, those with the longest context first.
        num_tiles_1: int32, how many of the M tiles there are.
    """

    spans_P4: torch.Tensor
    tiles_M: torch.Tensor
    num_tiles_1: torch.Tensor

    def spans(self) -> list[tuple[PrefillSpan, int]]:
        """The spans and their rows of the block table, for the references; waits for the device."""
        tiles = self.tiles_M[: int(self.num_tiles_1)].cpu().numpy().view(np.uint32)
        used = sorted(set((tiles >> 16).tolist()))
        return [
            (PrefillSpan(*numbers), table_row)
            for *numbers, table_row in self.spans_P4[used].tolist()
        ]


@dataclass(frozen=True)
class QueryPreparation:
    """How queries are made of the projection's output: norm, then rotation by their positions.

    Attributes:
        norm_weight_D: bfloat16.
        eps: added to the mean of the squares.
        cos_PF, sin_PF: float32, F = D / 2, of every position.
    """

    norm_weight_D: torch.Tensor
    eps: float
    cos_PF: torch.Tensor
    sin_PF: torch.Tensor


def takes(q_dtype: torch.dtype, num_heads: int, k_cache_BLGD: torch.Tensor) -> bool:
    """Whether the kernel takes such queries and such a cache."""
    num_blocks, block_size, num_kv_heads, head_dim = k_cache_BLGD.shape
    library = hopper.extension(k_cache_BLGD.device)
    return (
        library is not None
        and q_dtype == k_cache_BLGD.dtype == torch.bfloat16
        and num_blocks * block_size < 1 << 31
        and library.prefill_attention_fits(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size
        )
    )


def tile_tokens(num_heads: int, num_kv_heads: int) -> int:
    """Tokens of a tile: its rows are up to 8 query heads of each.

    Example: 32 query heads, 4 KV heads: 16 tokens.
    """
    return TILE_ROWS // math.gcd(num_heads // num_kv_heads, 8)


def order_tiles(
    spans: Sequence[PrefillSpan], first_table_row: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The spans, int32 [P, 4], and their tiles, uint32 [M], as in `PrefillTiles`.

    Args:
        spans: their rows of the block table follow one another.
        first_table_row: that of the first span.
        tokens: of a tile.

    Example: whole prompts of 20 and 40 tokens, 16 tokens a tile: 2 and 3 tiles, which all take one
    step, so they stay in order: ``[0, 1, 1 << 16, 1 << 16 | 1, 1 << 16 | 2]``.
    """
    assert len(spans) <= MAX_SPANS, len(spans)
    table = np.array(
        [
            (span.first_row, span.query_len, span.context_len, first_table_row + i)
            for i, span in enumerate(spans)
        ],
        dtype=np.int32,
    ).reshape(-1, 4)
    counts = -(-table[:, 1] // tokens)
    assert counts.max(initial=0) <= MAX_SPAN_TILES, (table[:, 1].max(), tokens)
    span_of = np.repeat(np.arange(len(spans)), counts)
    tile_of = np.arange(len(span_of)) - np.repeat(np.cumsum(counts) - counts, counts)
    _, query_lens, context_lens, _ = table[span_of].T
    last = np.minimum(context_lens - query_lens + (tile_of + 1) * tokens, context_lens) - 1
    longest_first = np.argsort(-(last // STEP_TOKENS), kind="stable")
    return table, (span_of << 16 | tile_of)[longest_first].astype(np.uint32)


def stage_tiles(
    spans: Sequence[PrefillSpan], first_table_row: int, tokens: int, device: torch.device
) -> PrefillTiles:
    """`order_tiles`, on the device; nobody waits for it."""
    table, tiles = order_tiles(spans, first_table_row, tokens)
    num_tiles = np.array([len(tiles)])
    spans_N, tiles_M, num_tiles_1 = stage([table.ravel(), tiles.view(np.int32), num_tiles], device)
    return PrefillTiles(spans_N.view(-1, 4), tiles_M, num_tiles_1)


def prefill_attention(
    q_TND: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    block_tables_SB: torch.Tensor,
    tiles: PrefillTiles,
    scale: float,
    out_TND: torch.Tensor,
    preparation: QueryPreparation | None = None,
) -> None:
    """Attend causally, from the spans' rows of the queries, into those of ``out_TND``.

    A row's bits depend on nothing but the row and its context, as long as what the sequence has in
    the cache is finite.

    Args:
        q_TND: bfloat16, whose rows may lie apart.
        cache: keys and values, each [B, L, G, D], contiguous, that `takes` has said yes to.
        block_tables_SB: int32, columns side by side.
        tiles: with as many tokens a tile as `tile_tokens` says.
        scale: positive factor on the scores.
        out_TND: contiguous.
        preparation: None: the queries are prepared.
    """
    from moe_engine.kernels.launch import compiles_only

    k_cache_BLGD, v_cache_BLGD = cache
    num_blocks, block_size, num_kv_heads, head_dim = k_cache_BLGD.shape
    for tensor in (q_TND, out_TND, k_cache_BLGD, v_cache_BLGD):
        assert tensor.dtype == torch.bfloat16, tensor.dtype
        assert tensor.data_ptr() % 16 == 0, tensor.data_ptr()
    for tensor in (out_TND, k_cache_BLGD, v_cache_BLGD):
        assert tensor.is_contiguous(), tensor.stride()
    assert q_TND.stride()[1:] == (head_dim, 1), q_TND.stride()
    assert q_TND.stride(0) % 8 == 0, q_TND.stride()
    assert q_TND.shape == out_TND.shape, (q_TND.shape, out_TND.shape)
    assert q_TND.shape[2] == head_dim, (q_TND.shape, head_dim)
    assert v_cache_BLGD.shape == k_cache_BLGD.shape, (v_cache_BLGD.shape, k_cache_BLGD.shape)
    assert block_tables_SB.dtype == torch.int32, block_tables_SB.dtype
    assert block_tables_SB.shape[1] == 1 or block_tables_SB.stride(1) == 1, block_tables_SB.stride()
    for numbers in (tiles.spans_P4, tiles.tiles_M, tiles.num_tiles_1):
        assert numbers.dtype == torch.int32, numbers.dtype
        assert numbers.is_contiguous(), numbers.stride()
        assert numbers.device == q_TND.device, numbers.device
    assert tiles.spans_P4.data_ptr() % 16 == 0, tiles.spans_P4.data_ptr()
    if preparation is not None:
        cos_PF, sin_PF = preparation.cos_PF, preparation.sin_PF
        assert preparation.norm_weight_D.dtype == torch.bfloat16, preparation.norm_weight_D.dtype
        assert preparation.norm_weight_D.shape == (head_dim,), preparation.norm_weight_D.shape
        for table in (cos_PF, sin_PF):
            assert table.dtype == torch.float32, table.dtype
            assert table.shape == (len(cos_PF), head_dim // 2), table.shape
            assert table.is_contiguous(), table.stride()
        for tensor in (preparation.norm_weight_D, cos_PF, sin_PF):
            assert tensor.data_ptr() % 16 == 0, tensor.data_ptr()
    if compiles_only():
        return  # nobody has written the block tables
    library = hopper.extension(q_TND.device)
    assert library is not None
    with torch.cuda.device(q_TND.device):
        library.prefill_attention(
            q=q_TND.data_ptr(),
            q_stride=q_TND.stride(0),
            q_weight=0 if preparation is None else preparation.norm_weight_D.data_ptr(),
            cos=0 if preparation is None else preparation.cos_PF.data_ptr(),
            sin=0 if preparation is None else preparation.sin_PF.data_ptr(),
            eps=0.0 if preparation is None else preparation.eps,
            k_cache=k_cache_BLGD.data_ptr(),
            v_cache=v_cache_BLGD.data_ptr(),
            block_tables=block_tables_SB.data_ptr(),
            block_tables_stride=block_tables_SB.stride(0),
            out=out_TND.data_ptr(),
            spans=tiles.spans_P4.data_ptr(),
            tiles=tiles.tiles_M.data_ptr(),
            num_tiles=tiles.num_tiles_1.data_ptr(),
            num_rows=q_TND.shape[0],
            num_slots=num_blocks * block_size,
            scale=scale,
            max_tiles=len(tiles.tiles_M),
            num_heads=q_TND.shape[1],
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            stream=torch.cuda.current_stream().cuda_stream,
        )
