"""A step of prompts and decodes, in memory that never moves.

Launching such a step's kernels one by one costs the host more than the device needs to run them,
until they are thousands of tokens. As the decode steps do (`engine.decode`), it runs in static
memory up to its hidden states, so that it can be captured in a CUDA graph, once for each number of
rows (see `engine.graphs`). Which rows belong to which sequence is data: decodes come first, and the
prompts' attention goes by a list of tiles (`ops.prefill_attention`). What follows, logits and
tokens, is launched as in any other step.

All rows are computed to the end, also those whose logits nobody needs; that is one layer in dozens.

Shape legend: W rows of the largest step, S sequences, B blocks, P spans, M tiles, T rows of a step,
H hidden size.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_engine.cache.kv import KVCache
from moe_engine.dist.exchange import Exchange
from moe_engine.engine.batch import StepBatch
from moe_engine.engine.table import SequenceTable
from moe_engine.layers.context import ForwardContext
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.ops.paged_batch import PagedBatch
from moe_engine.ops.prefill_attention import PrefillTiles, order_tiles, takes, tile_tokens

_SPAN_NUMBERS = 4
_HEADER = 4
"""Integers before the spans, which have to be aligned: how many tokens there are, and tiles."""


def takes_mixed_steps(model: Qwen3MoeForCausalLM, kv: KVCache) -> bool:
    """Whether `ops.prefill_attention`, which goes by a list of tiles, takes this model's heads."""
    k_cache_BLGD, _ = kv.layer(0)
    return takes(k_cache_BLGD.dtype, model.num_heads, k_cache_BLGD)


class MixedStep:
    """The static memory of steps of up to ``max_rows`` tokens, and what runs on it.

    Args:
        table: of the sequences.

    Attributes:
        max_rows: W.
    """

    def __init__(
        self, model: Qwen3MoeForCausalLM, kv: KVCache, table: SequenceTable, max_rows: int
    ) -> None:
        self.max_rows = max_rows
        self._model = model
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
        self._starts_S1 = torch.zeros(max_seqs + 1, dtype=torch.int32, device=device)
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

    def compute(self, num_rows: int, exchange: Exchange) -> torch.Tensor:
        """Run the loaded step as ``num_rows`` rows; nothing here waits for the device.

        Returns:
            Final hidden states [T, H]; a collective over the world.
        """
        first_tile, last_tile = self._first_tile, self._first_tile + self._max_tiles(num_rows)
        spans = self._numbers[_HEADER:first_tile]
        batch = PagedBatch(
            slots_T=self._slots_W[:num_rows],
            block_tables_SB=self._tables_SB,
            context_lens_S=self._decode_lens_S,
            query_starts_S=self._starts_S1,
            num_decodes=min(num_rows, self._max_seqs),
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
        x_TH: torch.Tensor = self._model(self._token_ids_W[:num_rows], step)
        return x_TH

    def _max_tiles(self, num_rows: int) -> int:
        """Of steps of so many rows: every span's last tile may be all but empty."""
        return num_rows // self._tile_tokens + min(self._max_seqs, num_rows // 2)
