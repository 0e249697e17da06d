"""A step in which every sequence decodes one token, in memory that never moves.

All that such a step needs from the host are two integers per sequence, its slot and its position;
the rest happens on the device: look up token ids and cache slots, and run the model. So all that
leads to the logits can be captured in a CUDA graph, once for each batch size (see `engine.graphs`).
Choosing tokens from the logits and appending them to the sequence table (`Choice`) can be captured
likewise; what it takes to draw, five numbers per sequence, has static memory as well.

Shape legend: W rows of the largest batch, S rows of a batch, V vocabulary.
"""

from __future__ import annotations

import enum

import numpy as np
import torch

from moe_engine.cache.kv import KVCache
from moe_engine.dist.exchange import Exchange
from moe_engine.dist.groups import ParallelGroups
from moe_engine.engine.table import SequenceTable
from moe_engine.layers.context import ForwardContext
from moe_engine.models.qwen3_moe import Qwen3MoeForCausalLM
from moe_engine.ops.decode import DecodeInputs, append_tokens, prepare_decode
from moe_engine.ops.paged_batch import PagedBatch
from moe_engine.ops.sampling import greedy_tokens, params_device, sample_tokens

_ROW_ALIGNMENT = 16


class Choice(enum.Enum):
    """Ways to choose the tokens of a batch from the logits as the model made them.

    Attributes:
        MOST_LIKELY: the most likely token of every row.
        DRAW: rows draw from all tokens; those with temperature 0 take the most likely one.
        FILTER_AND_DRAW: the same, and rows may have top_k, top_p and min_p.
    """

    MOST_LIKELY = enum.auto()
    DRAW = enum.auto()
    FILTER_AND_DRAW = enum.auto()


class DecodeStep:
    """The static memory of decode steps of up to ``max_rows`` sequences, and what runs on it.

    Attributes:
        max_rows: W.
        choices: what `choose` can be asked for without waiting for the device.
    """

    def __init__(
        self,
        model: Qwen3MoeForCausalLM,
        kv: KVCache,
        table: SequenceTable,
        groups: ParallelGroups,
        max_rows: int,
    ) -> None:
        self.max_rows = max_rows
        self._model = model
        self._short_model = model.shortened()
        self._kv = kv
        self._table = table
        self._groups = groups
        self._device = table.tokens_NC.device
        width = -(-max_rows // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        # From the host, in one transfer: the number of sequences, their slots, their positions.
        self._rows_3W = torch.zeros(3, width, dtype=torch.int32, device=self._device)
        self._rows_3W[1].fill_(-1)
        self._inputs = DecodeInputs.empty(max_rows, table.blocks_NB.shape[1], self._device)
        self._query_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=self._device)
        self._tokens_W = torch.zeros(max_rows, dtype=torch.int64, device=self._device)
        self._params_5W = torch.zeros(5, max_rows, dtype=torch.float64, device=self._device)
        can_draw = params_device(self._device) == self._device
        self.choices = tuple(Choice) if can_draw else (Choice.MOST_LIKELY,)

    def load(self, slots: list[int], positions: list[int]) -> None:
        """Bring a batch to the device; the rows behind it become padding."""
        size = len(slots)
        host = torch.empty(self._rows_3W.shape, dtype=torch.int32, pin_memory=self._rows_3W.is_cuda)
        rows: np.ndarray = host.numpy()
        rows[0, 0] = size
        rows[1, :size] = slots
        rows[1, size:] = -1
        rows[2, :size] = positions
        rows[2, size:] = 0
        self._rows_3W.copy_(host, non_blocking=True)

    def compute(self, num_rows: int, exchange: Exchange) -> torch.Tensor | None:
        """Run the loaded batch as ``num_rows`` rows; nothing here waits for the device.

        Returns:
            Logits [S, V] on the TP group's rank 0, None elsewhere (a collective over the world).
        """
        return self._logits(self._model, num_rows, exchange)

    def warm_up(self, num_rows: int, exchange: Exchange) -> None:
        """Launch all that `compute` and `choose` launch, but through few layers."""
        logits_SV = self._logits(self._short_model, num_rows, exchange)
        for choice in self.choices:
            self.choose(num_rows, logits_SV, choice)

    def _logits(
        self, model: Qwen3MoeForCausalLM, num_rows: int, exchange: Exchange
    ) -> torch.Tensor | None:
        slots_S, positions_S = self._rows_3W[1, :num_rows], self._rows_3W[2, :num_rows]
        inputs = self._inputs.first(num_rows)
        prepare_decode(
            slots_S,
            positions_S,
            self._table.tokens_NC,
            self._table.blocks_NB,
            self._table.block_size,
            inputs,
        )
        batch = PagedBatch(
            slots_T=inputs.cache_slots_S,
            block_tables_SB=inputs.block_tables_SB,
            context_lens_S=inputs.context_lens_S,
            query_starts_S=self._query_starts[: num_rows + 1],
            num_decodes=num_rows,
            prefills=(),
        )
        step = ForwardContext(
            positions_T=inputs.positions_S,
            batch=batch,
            kv=self._kv,
            exchange=exchange,
            num_tokens_1=self._rows_3W[0, :1],
        )
        return model.logits(model(inputs.token_ids_S, step))

    def load_draw(self, params_5B: np.ndarray) -> None:
        """Bring the parameters of `ops.sampling.sample_tokens` to the device, padding behind."""
        size = params_5B.shape[1]
        host = torch.empty(
            self._params_5W.shape, dtype=torch.float64, pin_memory=self._params_5W.is_cuda
        )
        params_5W: np.ndarray = host.numpy()
        params_5W[:, :size] = params_5B
        params_5W[:, size:] = 0.0
        self._params_5W.copy_(host, non_blocking=True)

    def choose(self, num_rows: int, logits_SV: torch.Tensor | None, choice: Choice) -> None:
        """Choose the tokens that follow the last `compute`, into `tokens` and the sequence table.

        Draws go by the parameters loaded. A collective over TP.

        Args:
            num_rows: as for `compute`.
            logits_SV: what `compute` returned.
            choice: one of `choices`, enough for what every row asks for.
        """
        tokens_S = self._tokens_W[:num_rows]
        if logits_SV is not None and choice is Choice.MOST_LIKELY:
            greedy_tokens(logits_SV, out=tokens_S)
        elif logits_SV is not None:
            params_5S = self._params_5W[:, :num_rows]
            may_filter = choice is Choice.FILTER_AND_DRAW
            sample_tokens(logits_SV, params_5S, may_filter=may_filter, out=tokens_S)
        self.append(tokens_S)

    def tokens(self, num_rows: int) -> torch.Tensor:
        """The tokens of the last `choose`, int64 [S]; overwritten by the next one."""
        return self._tokens_W[:num_rows]

    def append(self, tokens_S: torch.Tensor) -> None:
        """Let tokens chosen elsewhere follow the last `compute`, those of the TP group's rank 0.

        A collective over TP.

        Args:
            tokens_S: int64, of the first rows; overwritten on other ranks.
        """
        num_rows = len(tokens_S)
        tokens_S = self._groups.tp.broadcast(tokens_S)
        # The token follows the row's own, so its position is the length of the row's context.
        append_tokens(
            self._rows_3W[1, :num_rows],
            self._inputs.context_lens_S[:num_rows],
            tokens_S,
            self._table.tokens_NC,
        )
