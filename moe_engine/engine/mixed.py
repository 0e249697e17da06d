"""A step of prompts and decodes, in memory that never moves.

Launching such a step's kernels one by one costs the host more than the device needs to run them,
until they are thousands of tokens. As the decode steps do (`engine.decode`), it runs in static
memory up to its hidden states, so that it can be captured in a CUDA graph, once for each of some
sizes (see `engine.graphs`). Which rows are whose is data: decodes come first, and the prompts'
attention goes by a list of tiles (`ops.prefill_attention`). What follows, logits and tokens, is
launched as in any other step.

All rows are computed to the end, also those whose logits nobody needs; that is one layer in dozens.

Shape legend: W rows of the largest step, S sequences, B blocks, T rows of a step, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_engine.cache.kv import KVCache
from moe_engine.dist.exchange import Exchange, ExchangeSelector
from moe_engine.engine.batch import StepBatch
from moe_engine.engine.table import SequenceTable
from moe_engine.layers.context import ForwardContext
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.ops.paged_batch import PagedBatch
from moe_engine.ops.prefill_attention import PrefillTiles, order_tiles, takes, tile_tokens

MIXED_ROWS = (16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 2560, 3072, 4096)
"""Tokens of the steps to capture. Experts and attention leave padding out, linear layers do not:
2098 tokens in 3072 took a tenth longer than their kernels launched one by one, which keep the host
for nearly all of it, and do not in 2560. Larger steps keep the device longer than their launches
keep the host."""

FEW_DECODES = 16
"""As many of them, or as many as there can be, may be decodes. Their attention is launched for all
of those, and shares out the contexts of few among multiprocessors that would have nothing to do."""

_SPAN_NUMBERS = 4
_HEADER = 4
"""Integers before the spans, which have to be aligned: how many tokens there are, and tiles."""


@dataclass(frozen=True, slots=True)
class MixedSize:
    """A step to capture: its rows, and how many of them, the first, may be decodes."""

    num_rows: int
    num_decodes: int


def most_rows(max_tokens: int) -> int:
    """Of the largest step of up to so many tokens, padded to a size to capture if there is one."""
    return next((num_rows for num_rows in MIXED_ROWS if num_rows >= max_tokens), max_tokens)


def mixed_sizes(max_tokens: int, max_seqs: int, exchange: ExchangeSelector) -> list[MixedSize]:
    """What steps of up to ``max_tokens`` and ``max_seqs`` need and can be captured, ascending.

    Example: for 20 tokens of 24 sequences at most, 16 rows, all of which may be decodes, and 32
    rows, of which 16 or 24 may be.
    """
    num_smaller = sum(num_rows < max_tokens for num_rows in MIXED_ROWS)
    sizes = []
    for num_rows in MIXED_ROWS[: num_smaller + 1]:
        if exchange.select(num_rows).is_capturable:
            most = min(num_rows, max_seqs)
            sizes += [MixedSize(num_rows, num) for num in sorted({min(FEW_DECODES, most), most})]
    return sizes


def make_mixed_step(
    model: Qwen3MoeForCausalLM,
    kv: KVCache,
    table: SequenceTable,
    max_tokens: int,
    exchange: ExchangeSelector,
) -> MixedStep | None:
    """The step of the sizes to capture.

    Returns:
        None if there are no sizes, or if `ops.prefill_attention`, which goes by a list of tiles,
        does not take the model's heads.
    """
    sizes = mixed_sizes(max_tokens, len(table.blocks_NB), exchange)
    k_cache_BLGD, _ = kv.layer(0)
    if not (sizes and takes(k_cache_BLGD.dtype, model.num_heads, k_cache_BLGD)):
        return None
    return MixedStep(model, kv, table, sizes)


class MixedStep:
    """The static memory of steps of any of some sizes, and what runs on it.

    Args:
        table: of the sequences.

    Attributes:
        sizes: ascending; a number of rows comes with as many decodes as there can be, at least.
    """

    def __init__(
        self,
        model: Qwen3MoeForCausalLM,
        kv: KVCache,
        table: SequenceTable,
        sizes: list[MixedSize],
    ) -> None:
        self.sizes = sizes
        max_rows = sizes[-1].num_rows
        self._model = model
        self._short_model = model.shortened()
        self._kv = kv
        k_cache_BLGD, _ = kv.layer(0)
        self._tile_tokens = tile_tokens(model.num_heads, k_cache_BLGD.shape[2])
        device = table.blocks_NB.device
        max_seqs, max_blocks = table.blocks_NB.shape
        self._max_seqs = max_seqs
        self._token_ids_W = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions_W = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._slots_W = torch.full((max_rows,), -1, dtype=torch.int64, device=device)
        self._tables_SB = torch.zeros(max_seqs, max_blocks, dtype=torch.int32, device=device)
        self._decode_lens_S = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        self._no_starts = torch.empty(0, dtype=torch.int32, device=device)
        # From the host, in one transfer: tokens and tiles, how many; the spans; the tiles.
        self._first_tile = _HEADER + _SPAN_NUMBERS * max_seqs
        size = self._first_tile + self._max_tiles(max_rows)
        self._numbers = torch.zeros(size, dtype=torch.int32, device=device)

    def load(self, batch: StepBatch) -> None:
        """Bring a step to the static memory; the rows behind it become padding."""
        paged = batch.paged
        num_tokens, num_decodes = paged.num_tokens, paged.num_decodes
        self._token_ids_W[:num_tokens] = batch.token_ids_T
        self._positions_W[:num_tokens] = batch.positions_T
        self._slots_W[:num_tokens] = paged.slots_T
        self._slots_W[num_tokens:] = -1
        num_sequences, num_blocks = paged.block_tables_SB.shape
        self._tables_SB[:num_sequences, :num_blocks] = paged.block_tables_SB
        self._decode_lens_S[:num_decodes] = paged.context_lens_S[:num_decodes]
        self._decode_lens_S[num_decodes:] = 0
        spans, tiles = order_tiles(paged.prefills, num_decodes, self._tile_tokens)
        host = torch.empty(
            self._first_tile + len(tiles), dtype=torch.int32, pin_memory=self._numbers.is_cuda
        )
        numbers: np.ndarray = host.numpy()
        numbers[:2] = num_tokens, len(tiles)
        numbers[_HEADER : _HEADER + spans.size] = spans.ravel()
        numbers[self._first_tile :] = tiles.view(np.int32)
        self._numbers[: len(host)].copy_(host, non_blocking=True)

    def pick(self, num_tokens: int, num_decodes: int) -> MixedSize | None:
        """The smallest size for a step, None if there is none."""
        return next(
            (
                size
                for size in self.sizes
                if num_tokens <= size.num_rows and num_decodes <= size.num_decodes
            ),
            None,
        )

    def compute(self, size: MixedSize, exchange: Exchange) -> torch.Tensor:
        """Run the loaded step, which is of this size at most; nothing here waits for the device.

        Returns:
            Final hidden states [T, H], then padding; a collective over the world.
        """
        return self._hidden_states(self._model, size, exchange)

    def warm_up(self, exchange: ExchangeSelector) -> None:
        """Launch all that `compute` launches for any size, but through few layers.

        The largest comes first, whose memory the smaller ones use. A collective over the world.
        """
        for size in reversed(self.sizes):
            self._hidden_states(self._short_model, size, exchange.select(size.num_rows))

    def _hidden_states(
        self, model: Qwen3MoeForCausalLM, size: MixedSize, exchange: Exchange
    ) -> torch.Tensor:
        num_rows = size.num_rows
        first_tile, last_tile = self._first_tile, self._first_tile + self._max_tiles(num_rows)
        spans = self._numbers[_HEADER:first_tile]
        batch = PagedBatch(
            slots_T=self._slots_W[:num_rows],
            block_tables_SB=self._tables_SB,
            context_lens_S=self._decode_lens_S,
            query_starts_S=self._no_starts,
            num_decodes=size.num_decodes,
            prefills=(),
            tiles=PrefillTiles(
                spans.view(-1, _SPAN_NUMBERS),
                self._numbers[first_tile:last_tile],
                self._numbers[1:2],
            ),
        )
        step = ForwardContext(
            positions_T=self._positions_W[:num_rows],
            batch=batch,
            kv=self._kv,
            exchange=exchange,
            num_tokens_1=self._numbers[:1],
        )
        x_TH: torch.Tensor = model(self._token_ids_W[:num_rows], step)
        return x_TH

    def _max_tiles(self, num_rows: int) -> int:
        """Of steps of so many rows: every span's last tile may be all but empty."""
        return num_rows // self._tile_tokens + min(self._max_seqs, num_rows // 2)
